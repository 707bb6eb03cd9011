//! Lanes as words: `diffusion steps=8 block-length=16`, `ar drafter=redrafter`, `model=models/nano-ar`. The words are the long flags of
//! `lacuna generate` without their dashes, and are read by the same definitions.

use std::path::{Path, PathBuf};

use clap::Parser;

use crate::checkpoint;
use crate::cli::method::{AutoregressiveFlags, DiffusionFlags, SamplingFlags, methods};
use crate::engine::request::{AutoregressiveOptions, DiffusionOptions, MethodKind, SamplingOptions};
use crate::service::proto::{self, lane::Method};
use crate::service::{autoregressive_message, diffusion_message, sampling_message};

/// A lane as a request has it.
#[derive(Clone, Debug, PartialEq)]
pub struct LaneSpec(pub proto::Lane);

#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true, allow_negative_numbers = true)]
struct LaneFlags {
    #[arg(long)]
    name: Option<String>,
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    diffusion: DiffusionFlags,
    #[command(flatten)]
    autoregressive: AutoregressiveFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
}

/// Reads a lane. One without a name is called what it is.
pub fn parse(spec: &str) -> Result<LaneSpec, String> {
    let flag = |word: &str| match word {
        "ar" | "autoregressive" => "--method=autoregressive".to_owned(),
        "diffusion" => "--method=diffusion".to_owned(),
        word => format!("--{}", word.trim_start_matches('-')),
    };
    let flags = LaneFlags::try_parse_from(spec.split_whitespace().map(flag)).map_err(|error| reason(&error))?;
    let (method, diffusion, autoregressive) = methods(&flags.diffusion, &flags.autoregressive);
    let (diffuses, decodes) = (diffusion != DiffusionOptions::default(), autoregressive != AutoregressiveOptions::default());
    let method = match (method, diffuses, decodes) {
        (Some(MethodKind::Diffusion), _, true) => return Err("it has settings that only ar takes: leave out diffusion".into()),
        (Some(MethodKind::Autoregressive), true, _) => return Err("it has settings that only diffusion takes".into()),
        (None, true, true) => return Err("it has settings of both diffusion and ar".into()),
        (Some(MethodKind::Diffusion), ..) | (None, true, _) => Some(Method::Diffusion(diffusion_message(&diffusion))),
        (Some(MethodKind::Autoregressive), ..) | (None, _, true) => {
            Some(Method::Autoregressive(autoregressive_message(&autoregressive)))
        }
        (None, false, false) => None,
    };
    let sampling = Some(flags.sampling.options()).filter(|options| *options != SamplingOptions::default());
    Ok(LaneSpec(proto::Lane {
        name: flags.name.unwrap_or_else(|| spec.split_whitespace().collect::<Vec<_>>().join(" ")),
        model: flags.model.unwrap_or_default(),
        method,
        sampling: sampling.as_ref().map(sampling_message),
    }))
}

/// What is wrong, without the words around it that are about a command line.
fn reason(error: &clap::Error) -> String {
    let told = error.to_string();
    let lines = told.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines = lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    lines.collect::<Vec<_>>().join("; ").trim_start_matches("error: ").to_owned()
}

/// The folders to load: `listed`, and what lanes name that is none of them. Lanes then name models as the service does.
pub fn models(listed: &[PathBuf], specs: &mut [LaneSpec]) -> Vec<PathBuf> {
    let mut paths = listed.to_vec();
    for LaneSpec(lane) in specs.iter_mut().filter(|spec| !spec.0.model.is_empty()) {
        let named = Path::new(&lane.model);
        if paths.iter().any(|path| checkpoint::name_of(path) == lane.model) || !named.exists() {
            continue;
        }
        let whole = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if !paths.iter().any(|path| whole(path) == whole(named)) {
            paths.push(named.to_owned());
        }
        lane.model = checkpoint::name_of(named);
    }
    paths
}

/// Where nobody says: each model as it is, and each that has a drafter with it too.
pub fn defaults(models: &[proto::Model]) -> Vec<proto::Lane> {
    let mut lanes = vec![];
    for model in models {
        let capabilities = model.capabilities.unwrap_or_default();
        let drafter =
            model.default_autoregressive.map(|own| own.drafter()).filter(|own| *own as i32 > proto::Drafter::None as i32);
        let drafter = drafter.or(model.drafters.first().map(|limits| limits.drafter()));
        let lane = |name: String, method| proto::Lane { name, model: model.name.clone(), method, sampling: None };
        let with = |drafter: proto::Drafter| {
            Some(Method::Autoregressive(proto::Autoregressive { drafter: drafter.into(), ..proto::Autoregressive::default() }))
        };
        if capabilities.diffusion || !capabilities.autoregressive {
            lanes.push(lane(model.name.clone(), None));
        } else {
            lanes.push(lane(model.name.clone(), with(proto::Drafter::None)));
            let named = |drafter: proto::Drafter| drafter.as_str_name().trim_start_matches("DRAFTER_").to_lowercase();
            lanes.extend(drafter.map(|drafter| lane(format!("{} {}", model.name, named(drafter)), with(drafter))));
        }
    }
    lanes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_of_generate_make_a_lane() {
        let lane = parse("diffusion  steps=8 block-length=16 temperature=0.5").unwrap().0;
        assert_eq!(lane.name, "diffusion steps=8 block-length=16 temperature=0.5");
        let Some(Method::Diffusion(diffusion)) = lane.method else { panic!("{lane:?}") };
        assert_eq!((diffusion.steps, diffusion.block_length), (Some(8), Some(16)));
        assert_eq!(lane.sampling.unwrap().temperature, Some(0.5));
        let lane = parse("ar drafter=redrafter no-adapt suppress-end model=x name=y").unwrap().0;
        let Some(Method::Autoregressive(asked)) = lane.method else { panic!("{lane:?}") };
        assert_eq!((asked.drafter(), asked.adapt, asked.suppress_end), (proto::Drafter::Redrafter, Some(false), Some(true)));
        assert_eq!((lane.name.as_str(), lane.model.as_str(), lane.sampling), ("y", "x", None));
        // The settings say which method they are of.
        assert!(matches!(parse("threshold=0.9").unwrap().0.method, Some(Method::Diffusion(_))));
        assert!(matches!(parse("--drafter=none").unwrap().0.method, Some(Method::Autoregressive(_))));
        assert!(parse("model=x").unwrap().0.method.is_none());
    }

    #[test]
    fn what_cannot_be_read_is_told_in_a_line() {
        for (spec, told) in [
            ("diffusion steps=many", "invalid value 'many' for '--steps"),
            ("diffusion stepz=8", "unexpected argument '--stepz'"),
            ("steps=8 threshold=0.9", "cannot be used with"),
            ("drafter=mine", "use none, redrafter"),
            ("steps", "a value is required"),
            ("diffusion drafter=lookup", "only ar takes"),
            ("ar steps=8", "only diffusion takes"),
            ("steps=8 draft-length=3", "both"),
        ] {
            let reason = parse(spec).expect_err(spec);
            assert!(reason.contains(told) && !reason.contains('\n') && !reason.contains("Usage"), "{spec}: {reason}");
        }
    }

    #[test]
    fn lanes_may_name_folders() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
        let (nano, ar) = (root.join("nano"), root.join("nano-ar"));
        let spec = |model: &str| LaneSpec(proto::Lane { model: model.into(), ..proto::Lane::default() });
        let mut specs =
            [spec(""), spec("nano"), spec(&nano.join("../nano").to_string_lossy()), spec(&ar.to_string_lossy()), spec("gpt")];
        let paths = models(std::slice::from_ref(&nano), &mut specs);
        assert_eq!(paths, [nano, ar]);
        assert_eq!(specs.map(|spec| spec.0.model), ["", "nano", "nano", "nano-ar", "gpt"]);
    }
}
