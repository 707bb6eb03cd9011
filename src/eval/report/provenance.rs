//! What results were measured with, in few lines, and whether they may stand beside one another.

use serde::Deserialize;

use super::command::summary;
use super::input::Source;

/// In what results differ without meaning to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Trait {
    Dtype,
    Device,
    Threads,
    Machine,
    /// Tasks, and how they are put.
    Suite,
}

pub const TRAITS: [Trait; 5] = [Trait::Dtype, Trait::Device, Trait::Threads, Trait::Machine, Trait::Suite];

impl Trait {
    pub fn name(self) -> &'static str {
        match self {
            Self::Dtype => "dtype",
            Self::Device => "device",
            Self::Threads => "threads",
            Self::Machine => "machine",
            Self::Suite => "suite",
        }
    }

    fn of(self, source: &Source) -> Option<String> {
        let about = &source.about;
        match self {
            Self::Dtype => about.dtype.clone(),
            Self::Device => about.device.clone(),
            Self::Threads => about.threads.map(|count| count.to_string()),
            Self::Machine => about.machine.as_ref().map(ToString::to_string),
            Self::Suite => about.suite(),
        }
    }
}

/// The first trait in which sources differ, and who has what; what a file does not tell is not a difference.
pub fn difference(sources: &[&Source], allowed: &[Trait]) -> Option<(Trait, String)> {
    TRAITS.into_iter().filter(|found| !allowed.contains(found)).find_map(|found| {
        let mut values: Vec<(String, &str)> = vec![];
        for source in sources {
            if let Some(value) = found.of(source)
                && values.iter().all(|(other, _)| *other != value)
            {
                values.push((value, &source.file));
            }
        }
        let told = values.iter().map(|(value, file)| format!("{value} in {file}"));
        (values.len() > 1).then(|| (found, told.collect::<Vec<_>>().join(", ")))
    })
}

/// One line for each way of measuring that occurs, then the commands.
pub fn provenance(sources: &[&Source]) -> Vec<String> {
    let mut lines: Vec<(String, Vec<String>)> = vec![];
    for source in sources {
        let about = &source.about;
        let unknown = || "not recorded".to_owned();
        let dtype = about.dtype.clone().unwrap_or_else(|| format!("dtype {}", unknown()));
        let device = about.device.clone().unwrap_or_else(|| format!("device {}", unknown()));
        let threads = about.threads.map_or_else(unknown, |count| count.to_string());
        let seed = about.seed().map_or_else(unknown, |seed| seed.to_string());
        let machine = about.machine.as_ref().map_or(String::new(), |machine| format!("; {machine}"));
        let suite = about.suite().map_or(String::new(), |suite| format!("suite {suite}; "));
        let line = format!("{suite}{dtype}; {device}; threads {threads}; seed {seed}{machine}");
        let mut models: Vec<String> =
            source.points.iter().map(|point| point.model.clone()).filter(|model| !model.is_empty()).collect();
        match lines.iter_mut().find(|(other, _)| *other == line) {
            Some((_, known)) => known.append(&mut models),
            None => lines.push((line, models)),
        }
    }
    let ways = lines.into_iter().map(|(line, mut models)| {
        let mut seen: Vec<String> = vec![];
        models.retain(|model| {
            !seen.contains(model) && {
                seen.push(model.clone());
                true
            }
        });
        let what = if models.len() == 1 { "model" } else { "models" };
        let models = if models.is_empty() { "model not recorded".into() } else { format!("{what} {}", models.join(", ")) };
        format!("{models}; {line}")
    });
    let silent: Vec<_> =
        sources.iter().filter(|source| source.about.commands.is_empty()).map(|source| source.file.as_str()).collect();
    let unknown = (!silent.is_empty()).then(|| format!("command not recorded: {}", silent.join(", ")));
    let commands = summary(sources.iter().flat_map(|source| source.about.commands.iter().map(String::as_str)));
    ways.chain(commands).chain(unknown).collect()
}
