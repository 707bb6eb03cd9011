//! Commands as results keep them: what of one says which curve a point belongs to, and many told as one.

use std::collections::BTreeMap;

/// Flags that trade accuracy for speed along a curve.
const SETTINGS: &str = "--steps --threshold --factor --entropy-bound --block-length --schedule --order";
/// Flags that say where, how much or in what form, and not how to decode.
const ASIDE: &str = "--model --drafters --dtype --device --context --threads --data --tasks --tasks-seed --chat --infill --samples --k --stop \
                     --outcomes --concurrency --json --target --rounds --duration --requests --warm-up --events --rate --count --prompts \
                     --prompts-seed --connections --client-threads";
/// Flags without a value.
const BARE: &str =
    "--json --chat --infill --events --no-adapt --deterministic --independent --no-finish-early --suppress-end --late-end";

fn among(flags: &str, flag: &str) -> bool {
    flags.split_whitespace().any(|known| known == flag)
}

/// A command line taken apart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Command {
    /// The command's name and what else is no flag.
    words: Vec<String>,
    /// With their values, in their order.
    flags: Vec<(String, String)>,
}

impl Command {
    pub fn parse(text: &str) -> Self {
        let mut command = Self::default();
        // As typed or as kept, with the program's name or without.
        let mut words = text.strip_prefix("lacuna ").unwrap_or(text).split_whitespace().peekable();
        while let Some(word) = words.next() {
            if let Some((flag, value)) = word.split_once('=').filter(|(flag, _)| flag.starts_with("--")) {
                command.flags.push((flag.into(), value.into()));
            } else if word.starts_with("--") {
                let value = words.next_if(|next| !among(BARE, word) && !next.starts_with("--"));
                command.flags.push((word.into(), value.unwrap_or_default().into()));
            } else {
                command.words.push(word.into());
            }
        }
        command
    }

    /// "threshold 0.9, block length 8".
    pub fn setting(&self) -> String {
        self.told(|flag| among(SETTINGS, flag))
    }

    /// Every flag, as a setting.
    pub fn all(&self) -> String {
        self.told(|_| true)
    }

    /// The curve's name: the model, and what else says how to decode.
    pub fn path(&self, model: &str) -> String {
        let rest = self.told(|flag| !among(SETTINGS, flag) && !among(ASIDE, flag));
        if rest.is_empty() { model.into() } else { format!("{model}, {rest}") }
    }

    fn told(&self, which: impl Fn(&str) -> bool) -> String {
        let flags = self.flags.iter().filter(|(flag, _)| which(flag));
        let told = flags
            .map(|(flag, value)| format!("{} {value}", flag.trim_start_matches('-').replace('-', " ")).trim_end().to_owned());
        told.collect::<Vec<_>>().join(", ")
    }
}

/// Commands on few lines: what several have in common is told once, and then what each has beside it.
pub fn summary<'a>(commands: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut groups: BTreeMap<Vec<String>, Vec<Command>> = BTreeMap::new();
    for command in commands {
        let command = Command::parse(command);
        let group = groups.entry(command.words.clone()).or_default();
        if !group.contains(&command) {
            group.push(command);
        }
    }
    groups.into_iter().map(|(words, commands)| line(&words, &commands)).collect()
}

fn line(words: &[String], commands: &[Command]) -> String {
    let common: Vec<_> =
        commands[0].flags.iter().filter(|flag| commands.iter().all(|command| command.flags.contains(flag))).collect();
    let text = |(flag, value): &(String, String)| format!("{flag} {value}").trim_end().to_owned();
    let shared = common.iter().map(|flag| text(flag));
    // Scripts beside this program have commands of their own.
    let program = if words.first().is_some_and(|word| word == "python") { "" } else { "lacuna " };
    let shared = std::iter::once(format!("{program}{}", words.join(" "))).chain(shared).collect::<Vec<_>>().join(" ");
    let own = commands.iter().map(|command| {
        let rest = command.flags.iter().filter(|flag| !common.contains(flag)).map(text).collect::<Vec<_>>();
        if rest.is_empty() { "nothing more".into() } else { rest.join(" ") }
    });
    if commands.len() == 1 { shared } else { format!("{shared}, with each of: {}", own.collect::<Vec<_>>().join(" | ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_says_its_curve_and_its_setting() {
        let command =
            Command::parse("eval nano --json --threads 2 --threshold 0.9 --cache dual --block-length=8 --late-end --model m");
        assert_eq!(command.path("nano"), "nano, cache dual, late end");
        assert_eq!(command.setting(), "threshold 0.9, block length 8");
        assert_eq!(Command::parse("eval nano --json --model models/nano-ar").path("nano-ar"), "nano-ar");
        // A bare flag takes no value.
        assert_eq!(Command::parse("eval --json nano").words, ["eval", "nano"]);
        assert_eq!(Command::parse("eval humaneval --chat --data x --drafter none").path("s"), "s, drafter none");
    }

    #[test]
    fn many_commands_are_told_as_one() {
        let commands = [
            "eval nano --json --steps 8",
            "eval nano --json --threshold 0.9",
            "eval nano --json",
            "eval nano --json --steps 8",
        ];
        let told = "lacuna eval nano --json, with each of: --steps 8 | --threshold 0.9 | nothing more";
        assert_eq!(summary(commands), [told]);
        assert_eq!(summary(["python a.py --runs 3", "eval nano"]), ["lacuna eval nano", "python a.py --runs 3"]);
    }
}
