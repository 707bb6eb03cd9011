//! Training draft heads for a teacher small enough for seconds: they learn to foresee it, a run in sittings is the unbroken run,
//! and what is written serves.

use std::path::Path;
use std::sync::LazyLock;

use lacuna::checkpoint::Checkpoint;
use lacuna::decode::Drafting;
use lacuna::decode::autoregressive::DrafterKind;
use lacuna::decode::autoregressive::adaptation::Shape;
use lacuna::draft::{Context, Drafters};
use lacuna::model::family::Attention;
use lacuna::tensor::{Dtype, Placement, Tensor};
use lacuna::train::data::Objective;
use lacuna::train::drafter::{HeadKind, Loss, Options, run, texts};
use lacuna::train::progress::Budget;
use serde_json::Value;
use tempfile::TempDir;

fn budget(steps: Option<u64>, stop_after: Option<u64>) -> Budget {
    Budget { steps, minutes: None, stop_after }
}

fn model(objective: Objective, steps: u64) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    lacuna::train::run(&lacuna::train::Options {
        out: folder.path().into(),
        objective,
        tokenizer: Some(concat!(env!("CARGO_MANIFEST_DIR"), "/models/nano").into()),
        from: None,
        block_length: 8,
        seed: 5,
        budget: budget(Some(steps), None),
        batch: 8,
        learning_rate: 3e-3,
        hidden_size: 32,
        layers: 1,
        heads: 2,
        dtype: Dtype::F32,
        device: "cpu".into(),
        threads: 1,
    })
    .unwrap();
    folder
}

/// A model that has barely learnt to put one token behind another.
static TEACHER: LazyLock<TempDir> = LazyLock::new(|| model(Objective::Autoregressive, 150));

fn options(out: &Path, kind: HeadKind) -> Options {
    Options {
        teacher: TEACHER.path().into(),
        kind,
        out: out.into(),
        texts: texts::Settings { prompts: None, temperature: 0.7, length: 16, count: Some(96), seed: 2 },
        seed: 2,
        budget: budget(Some(80), None),
        batch: 8,
        learning_rate: 3e-3,
        loss: Loss::Kl,
        layers: 1,
        heads: None,
        exit_dim: None,
        unroll: None,
        draft_vocabulary: None,
        dtype: Dtype::F32,
        threads: 1,
    }
}

fn last_line(folder: &Path) -> Value {
    let text = std::fs::read_to_string(folder.join("training/curve.jsonl")).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

fn texts_of(out: &Path) -> Vec<texts::Text> {
    let file = std::fs::read_to_string(out.join("training/texts.jsonl")).unwrap();
    file.lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Share of the teacher's greedy texts in which the loaded heads' best draft for one place is right.
fn drafted_rightly(out: &Path, kind: DrafterKind) -> f64 {
    let checkpoint = Checkpoint::open(TEACHER.path()).unwrap();
    let model = checkpoint.load(Placement::CPU_F32, 256, &mut |_| {}).unwrap();
    let drafters = Drafters::load(out, &checkpoint.config, Placement::CPU_F32).unwrap();
    let best = Shape { width: 1, length: 1 };
    let (mut right, mut all) = (0, 0);
    // The first texts are the held-out ones.
    for text in texts_of(out).iter().take(256).filter(|text| text.tokens.len() > text.prompt + 4) {
        let ids: Vec<i64> = text.tokens.iter().map(|id| i64::from(*id)).collect();
        let hidden = model.hidden(&Tensor::from_slice(&ids).view([1, -1]), Attention::Causal).unwrap();
        // Some tokens into the text: how it begins is nearly the same for all of them.
        let place = text.prompt + 1;
        let draft = drafters
            .draft(&Context {
                model: &model,
                tokens: &text.tokens[..place + 2],
                hidden: &hidden.select(1, place as i64),
                asked: Drafting { drafter: kind, row: 0, shape: best, least: 0.0, temperature: 0.0, seed: 0 },
            })
            .unwrap();
        assert_eq!(draft.tree.tokens()[0], text.tokens[place + 1]);
        right += u32::from(draft.tree.child(0, text.tokens[place + 2]).is_some());
        all += 1;
    }
    assert!(all > 50, "{all} texts are long enough");
    f64::from(right) / f64::from(all)
}

#[test]
fn heads_learn_in_sittings_as_they_do_unbroken_and_then_draft() {
    for (kind, drafter) in [(HeadKind::Redrafter, DrafterKind::Redrafter), (HeadKind::Medusa, DrafterKind::Medusa)] {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        run(&options(whole.path(), kind)).unwrap();
        run(&Options { budget: budget(Some(80), Some(1)), ..options(parts.path(), kind) }).unwrap();
        let untaught = drafted_rightly(parts.path(), drafter);
        // A kill while the teacher writes leaves half a line; the texts before it stay, and the others come out the same.
        let file = parts.path().join("training/texts.jsonl");
        let written = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, &written[..written.len() * 2 / 3]).unwrap();
        for sitting in [Some(30), None] {
            run(&Options { budget: budget(Some(80), sitting), ..options(parts.path(), kind) }).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), written);
        let name = format!("{kind:?}").to_lowercase();
        for file in ["model.safetensors", "config.json"] {
            let read = |folder: &TempDir| std::fs::read(folder.path().join(&name).join(file)).unwrap();
            assert!(read(&whole) == read(&parts), "{name}/{file}");
        }
        let line = last_line(&whole.path().join(&name));
        assert_eq!(line["held_out_loss"], last_line(&parts.path().join(&name))["held_out_loss"]);
        let taught = drafted_rightly(whole.path(), drafter);
        assert!(taught > untaught + 0.2, "{name} drafts {taught} rightly, and {untaught} after one step: {line}");
        assert!(line["held_out_acceptance_length"].as_f64().unwrap() > 1.2, "{line}");
    }
}

#[test]
fn a_trimmed_vocabulary_holds_the_tokens_that_the_teacher_writes_most() {
    let out = tempfile::tempdir().unwrap();
    let asked = options(out.path(), HeadKind::Redrafter);
    run(&Options { draft_vocabulary: Some(64), exit_dim: Some(24), loss: Loss::Hard, unroll: Some(3), ..asked }).unwrap();
    assert!(drafted_rightly(out.path(), DrafterKind::Redrafter) > 0.3);
    let line = last_line(&out.path().join("redrafter"));
    assert_eq!(line["held_out_acceptance"].as_array().unwrap().len(), 3, "{line}");
    // What the loader makes of the offsets is what the texts hold most of.
    let mut counts = std::collections::BTreeMap::<u32, usize>::new();
    texts_of(out.path())[256..].iter().flat_map(|t| &t.tokens[t.prompt..]).for_each(|id| *counts.entry(*id).or_default() += 1);
    let files = lacuna::checkpoint::weights::WeightFiles::open(&out.path().join("redrafter")).unwrap();
    let offsets: Vec<f32> = Vec::try_from(&files.load("d2t", Placement::CPU_F32).unwrap()).unwrap();
    let tokens: Vec<u32> = offsets.iter().enumerate().map(|(row, offset)| row as u32 + *offset as u32).collect();
    assert!(tokens.is_sorted() && tokens.len() == 64, "{tokens:?}");
    let least = tokens.iter().map(|id| counts.get(id).copied().unwrap_or(0)).min().unwrap();
    let most = counts.iter().filter(|(id, _)| !tokens.contains(id)).map(|(_, count)| *count).max().unwrap_or(0);
    assert!(least >= most, "kept one that occurs {least} times, dropped one that occurs {most} times");
}

#[test]
fn prompts_come_from_a_file_and_some_only_measure() {
    let out = tempfile::tempdir().unwrap();
    let prompts = out.path().join("prompts.jsonl");
    std::fs::write(&prompts, "\"# Return\"\n{\"prompt\": \"def solve(xs):\\n\"}\ndef answer(n):\n\n").unwrap();
    let asked = options(out.path(), HeadKind::Medusa);
    let given = texts::Settings { prompts: Some(prompts.clone()), count: None, ..asked.texts.clone() };
    run(&Options { texts: given.clone(), budget: budget(Some(2), None), heads: Some(2), ..asked.clone() }).unwrap();
    let tokenizer = Checkpoint::open(TEACHER.path()).unwrap().tokenizer;
    let mut found: Vec<String> =
        texts_of(out.path()).iter().map(|text| tokenizer.decode(&text.tokens[..text.prompt], false).unwrap()).collect();
    found.sort();
    assert_eq!(found, ["# Return", "def answer(n):", "def solve(xs):\n"]);
    // Texts follow from the file's content: they are not taken for those of another.
    std::fs::write(&prompts, "\"# Return\"\n\"# Count\"\n").unwrap();
    let error = run(&Options { texts: given, budget: budget(Some(3), None), heads: Some(2), ..asked }).unwrap_err();
    assert!(error.to_string().contains("other settings: remove it"), "{error}");
}

#[test]
fn what_cannot_be_is_refused() {
    let out = tempfile::tempdir().unwrap();
    let diffusion = model(Objective::Diffusion, 1);
    let medusa = || options(out.path(), HeadKind::Medusa);
    let redrafter = || options(out.path(), HeadKind::Redrafter);
    let cases = [
        (Options { teacher: diffusion.path().into(), ..medusa() }, "is a diffusion model (llada, bidirectional attention)"),
        (Options { teacher: "nowhere".into(), ..medusa() }, "there is no model nowhere"),
        (Options { exit_dim: Some(8), ..medusa() }, "--exit-dim, --unroll and --draft-vocabulary are ReDrafter's"),
        (Options { heads: Some(3), ..redrafter() }, "--heads is Medusa's"),
        (Options { draft_vocabulary: Some(5000), ..redrafter() }, "--draft-vocabulary must be from 2 to the model's"),
        (Options { budget: budget(None, None), ..redrafter() }, "--steps or --minutes"),
        (Options { layers: 0, ..redrafter() }, "--layers must be from 1"),
    ];
    for (options, expected) in cases {
        let error = run(&options).unwrap_err().to_string();
        assert!(error.to_lowercase().contains(&expected.to_lowercase()), "{error} lacks: {expected}");
    }
}
