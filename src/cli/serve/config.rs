//! Where `lacuna serve`'s settings come from: a TOML file, the environment, flags, in that rising order, all by the flags' names.
//!
//! What the file and the environment say becomes the flags' defaults, so that one parser judges a value wherever it stands: in the
//! file as `max-resident = 8`, in the environment as `LACUNA_MAX_RESIDENT=8`. It knows no setting by itself.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use thiserror::Error;
use toml::de::{DeTable, DeValue};

/// The command that is layered.
const COMMAND: &str = "serve";
/// Flags that say what to do, not how.
const OUTSIDE: [&str; 4] = ["help", "version", "config", "check"];

/// Everything that keeps a server from starting, each problem by itself.
#[derive(Debug, Error)]
#[error("{}", .0.join("\n       "))]
pub struct Problems(pub Vec<String>);

/// One setting as it is in force.
#[derive(Clone, Debug)]
pub struct Setting {
    pub name: String,
    /// As TOML writes it; `None` where nothing is set.
    pub value: Option<String>,
    pub origin: String,
}

/// All settings, in the order of the flags.
#[derive(Clone, Debug, Default)]
pub struct InForce(pub Vec<Setting>);

/// What a layer says of one flag.
struct Given {
    values: Vec<OsString>,
    origin: String,
}

/// How TOML writes a flag's value.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Switch,
    Integer,
    Float,
    Text,
}

impl Kind {
    fn of(flag: &Arg) -> Self {
        let id = flag.get_value_parser().type_id();
        let integers = [TypeId::of::<u16>(), TypeId::of::<u32>(), TypeId::of::<u64>(), TypeId::of::<usize>()];
        match flag.get_action() {
            ArgAction::SetTrue => Self::Switch,
            _ if integers.iter().any(|integer| id == *integer) => Self::Integer,
            _ if id == TypeId::of::<f64>() => Self::Float,
            _ => Self::Text,
        }
    }

    fn wanted(self) -> &'static str {
        match self {
            Self::Switch => "true or false",
            Self::Integer => "a whole number",
            Self::Float => "a number",
            Self::Text => "a string in quotes",
        }
    }

    /// A value of this kind as a flag would be given it.
    fn read(self, value: &DeValue) -> Option<OsString> {
        match (self, value) {
            (Self::Switch, DeValue::Boolean(set)) => Some(set.to_string().into()),
            (Self::Integer | Self::Float, DeValue::Integer(number)) => {
                i64::from_str_radix(number.as_str(), number.radix()).ok().map(|number| number.to_string().into())
            }
            (Self::Float, DeValue::Float(number)) => Some(number.as_str().into()),
            (Self::Text, DeValue::String(text)) => Some(text.as_ref().into()),
            _ => None,
        }
    }

    fn write(self, value: &OsStr) -> String {
        let text = value.to_string_lossy();
        // What JSON makes of a text is TOML too.
        if self == Self::Text { serde_json::Value::from(text).to_string() } else { text.into_owned() }
    }
}

/// Parses a command line. `serve` takes what that leaves open from `environment` and from a file.
///
/// Errors of the command line itself are clap's, those of the layers below are [`Problems`].
pub fn parse(
    command: Command,
    arguments: &[OsString],
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Result<(ArgMatches, InForce), Problems>, clap::Error> {
    let plain = command.clone().try_get_matches_from(arguments)?;
    let Some((COMMAND, serve)) = plain.subcommand() else { return Ok(Ok((plain, InForce::default()))) };
    let config = serve.get_one::<PathBuf>("config").cloned().or_else(|| environment("LACUNA_CONFIG").map(PathBuf::from));
    let flags = flags(&command);
    let mut problems = vec![];
    let mut given = config.map(|path| file(&path, &flags, &mut problems)).unwrap_or_default();
    given.extend(variables(&flags, environment));
    given.retain(|id, given| match refused(&command, &flags[id], given) {
        Some(reason) => {
            problems.push(format!("{}: {reason}", given.origin));
            false
        }
        None => true,
    });
    if !problems.is_empty() {
        return Ok(Err(Problems(problems)));
    }
    let matches = with_defaults(command.clone(), &given).try_get_matches_from(arguments)?;
    let settings = match matches.subcommand() {
        Some((_, serve)) => in_force(&command, serve, &given),
        None => InForce::default(),
    };
    Ok(Ok((matches, settings)))
}

/// The flags that can be set, by their ids: the command's own, and those of every command.
fn flags(command: &Command) -> BTreeMap<String, Arg> {
    ordered(command).into_iter().map(|flag| (flag.get_id().to_string(), flag)).collect()
}

fn ordered(command: &Command) -> Vec<Arg> {
    let own = command.find_subcommand(COMMAND).into_iter().flat_map(Command::get_arguments);
    let all = own.chain(command.get_arguments().filter(|flag| flag.is_global_set()));
    all.filter(|flag| flag.get_long().is_some_and(|name| !OUTSIDE.contains(&name))).cloned().collect()
}

/// What a file says, by the flags' ids.
fn file(path: &PathBuf, flags: &BTreeMap<String, Arg>, problems: &mut Vec<String>) -> BTreeMap<String, Given> {
    let shown = path.display();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            problems.push(format!("cannot read {shown}: {error}"));
            return BTreeMap::new();
        }
    };
    let at = |span: Range<usize>| format!("{shown}:{}", text[..span.start.min(text.len())].matches('\n').count() + 1);
    let table = match DeTable::parse(&text) {
        Ok(table) => table.into_inner(),
        Err(error) => {
            problems.push(format!("{}: {}", error.span().map_or_else(|| shown.to_string(), at), error.message()));
            return BTreeMap::new();
        }
    };
    let mut given = BTreeMap::new();
    for (key, value) in &table {
        let (name, origin) = (key.get_ref().as_ref(), at(key.span()));
        let Some((id, flag)) = flags.iter().find(|(_, flag)| flag.get_long() == Some(name)) else {
            problems.push(format!("{origin}: there is no setting '{name}': see 'lacuna serve --help' for their names"));
            continue;
        };
        let kind = Kind::of(flag);
        let values: Option<Vec<OsString>> = match (value.get_ref(), flag.get_action()) {
            (DeValue::Array(values), ArgAction::Append) => values.iter().map(|value| kind.read(value.get_ref())).collect(),
            (value, _) => kind.read(value).map(|value| vec![value]),
        };
        match values {
            Some(values) => drop(given.insert(id.clone(), Given { values, origin })),
            None => problems.push(format!("{origin}: {name} is {}, not {}", value.get_ref().type_str(), kind.wanted())),
        }
    }
    given
}

/// What the environment says. Several values stand in one variable, as paths do in PATH.
fn variables(flags: &BTreeMap<String, Arg>, environment: impl Fn(&str) -> Option<OsString>) -> BTreeMap<String, Given> {
    let read = |(id, flag): (&String, &Arg)| {
        let origin = variable(flag.get_long()?);
        let value = environment(&origin).filter(|value| !value.is_empty())?;
        let values = match flag.get_action() {
            ArgAction::Append => std::env::split_paths(&value).map(PathBuf::into_os_string).collect(),
            _ => vec![value],
        };
        Some((id.clone(), Given { values, origin }))
    };
    flags.iter().filter_map(read).collect()
}

/// What a flag is called in the environment.
fn variable(name: &str) -> String {
    format!("LACUNA_{}", name.to_uppercase().replace('-', "_"))
}

/// Why a flag cannot have what it is given, in the parser's own words.
fn refused(command: &Command, flag: &Arg, given: &Given) -> Option<String> {
    let name = flag.get_long()?;
    let trial = match (Kind::of(flag), given.values.as_slice()) {
        (Kind::Switch, [value]) if value == "true" || value == "false" => return None,
        (Kind::Switch, _) => return Some(format!("{name} is neither true nor false")),
        (_, values) => values.iter().map(|value| {
            let mut flag = OsString::from(format!("--{name}="));
            flag.push(value);
            flag
        }),
    };
    let arguments = ["lacuna".into(), COMMAND.into()].into_iter().chain(trial);
    let error = command.clone().try_get_matches_from(arguments).err()?.to_string();
    let first = error.lines().next().unwrap_or_default();
    Some(first.strip_prefix("error: ").unwrap_or(first).to_owned())
}

fn with_defaults(mut command: Command, given: &BTreeMap<String, Given>) -> Command {
    for (id, given) in given {
        let values = given.values.clone();
        let set = |flag: Arg| flag.default_values(values);
        let everywhere = command.get_arguments().any(|flag| flag.get_id() == id.as_str());
        command = match everywhere {
            true => command.mut_arg(id, set),
            false => command.mut_subcommand(COMMAND, |serve| serve.mut_arg(id, set)),
        };
    }
    command
}

fn in_force(command: &Command, matches: &ArgMatches, given: &BTreeMap<String, Given>) -> InForce {
    let setting = |flag: Arg| {
        let (id, name, kind) = (flag.get_id().as_str(), flag.get_long().unwrap_or_default(), Kind::of(&flag));
        let origin = match (matches.value_source(id), given.get(id)) {
            (Some(ValueSource::CommandLine), _) => format!("--{name}"),
            (_, Some(given)) => given.origin.clone(),
            _ => "default".into(),
        };
        let values: Vec<_> = match kind {
            // clap has no raw value of a switch that was given without one.
            Kind::Switch => vec![matches.get_flag(id).to_string()],
            kind => matches.get_raw(id).into_iter().flatten().map(|value| kind.write(value)).collect(),
        };
        let value = match (flag.get_action(), values.as_slice()) {
            (_, []) => None,
            (ArgAction::Append, values) => Some(format!("[{}]", values.join(", "))),
            (_, values) => Some(values.concat()),
        };
        Setting { name: name.into(), value, origin }
    };
    InForce(ordered(command).into_iter().map(setting).collect())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::CommandFactory;

    use super::*;
    use crate::cli::Arguments;

    /// What is in force of one setting, and where it comes from.
    fn layered(arguments: &[&str], environment: &[(&str, &str)], file: &str, name: &str) -> Result<(String, String), String> {
        let mut config = tempfile::NamedTempFile::new().unwrap();
        config.write_all(file.as_bytes()).unwrap();
        let path = config.path().to_str().unwrap().to_owned();
        let arguments: Vec<OsString> =
            ["lacuna", "serve", "--config", &path].iter().chain(arguments).map(OsString::from).collect();
        let found = |name: &str| environment.iter().find(|(own, _)| *own == name).map(|(_, value)| value.into());
        let parsed = parse(Arguments::command(), &arguments, found).map_err(|error| error.to_string())?;
        let (_, settings) = parsed.map_err(|problems| problems.to_string().replace(&path, "FILE"))?;
        let setting = settings.0.into_iter().find(|setting| setting.name == name).unwrap();
        Ok((setting.value.unwrap_or_default(), setting.origin.replace(&path, "FILE")))
    }

    #[test]
    fn flags_go_before_the_environment_and_that_before_the_file() {
        let file = "# how many\nqueue = 7\nmodel = [\"a\", \"b\"]\nlog-format = \"json\"\n";
        let told = |value: &str, origin: &str| Ok((value.to_owned(), origin.to_owned()));
        let environment = [("LACUNA_QUEUE", "8"), ("LACUNA_MODEL", "c:d")];
        assert_eq!(layered(&[], &[], "", "queue"), told("64", "default"));
        assert_eq!(layered(&[], &[], file, "queue"), told("7", "FILE:2"));
        assert_eq!(layered(&[], &environment, file, "queue"), told("8", "LACUNA_QUEUE"));
        assert_eq!(layered(&["--queue", "9"], &environment, file, "queue"), told("9", "--queue"));
        assert_eq!(layered(&[], &[], file, "model"), told("[\"a\", \"b\"]", "FILE:3"));
        assert_eq!(layered(&[], &environment, file, "model"), told("[\"c\", \"d\"]", "LACUNA_MODEL"));
        assert_eq!(layered(&["--model", "e"], &environment, file, "model"), told("[\"e\"]", "--model"));
        assert_eq!(layered(&[], &[], file, "log-format"), told("\"json\"", "FILE:4"));
        assert_eq!(layered(&[], &[], file, "max-tokens"), told("", "default"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (file, told) in [
            ("queues = 7", "FILE:1: there is no setting 'queues'"),
            ("\nqueue = \"7\"", "FILE:2: queue is string, not a whole number"),
            ("queue = -1", "FILE:1: invalid value '-1' for '--queue <N>'"),
            ("address = \"here\"", "FILE:1: invalid value 'here' for '--address"),
            ("address = 7", "FILE:1: address is integer, not a string in quotes"),
            ("model = [7]", "FILE:1: model is array, not a string in quotes"),
            ("config = \"other\"", "FILE:1: there is no setting 'config'"),
            ("\n\nqueue = ", "FILE:3: "),
            ("queue = 1\nqueue = 2", "FILE:2: duplicate key"),
        ] {
            let said = layered(&[], &[], file, "queue").unwrap_err();
            assert!(said.contains(told), "{told}: {said}");
        }
        let said = layered(&[], &[("LACUNA_QUEUE", "x")], "colour = 1\nhue = 2\n", "queue").unwrap_err();
        for told in ["FILE:1", "FILE:2", "LACUNA_QUEUE: invalid value 'x'"] {
            assert!(said.contains(told), "{told}: {said}");
        }
    }
}
