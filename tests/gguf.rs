//! GGUF files: what `gguf`, `transformers` and llama.cpp read in them (tests/reference/make_gguf.py), and what is said of
//! broken ones.

use std::path::{Path, PathBuf};

use lacuna::checkpoint::chat::Message;
use lacuna::checkpoint::gguf::blocks::Block;
use lacuna::checkpoint::gguf::import;
use lacuna::checkpoint::gguf::reader::Gguf;
use lacuna::checkpoint::{Checkpoint, CheckpointError};
use lacuna::model::quantized::Scheme;
use lacuna::tensor::{Dtype, Kind, Placement, Tensor};
use proptest::prelude::*;
use serde_json::Value;

const NETWORKS: [&str; 2] = ["llama", "qwen2"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

fn tensors(name: &str) -> impl Fn(&str) -> Tensor + use<> {
    let tensors = Tensor::read_safetensors(fixture(name)).unwrap();
    move |wanted| tensors.iter().find(|(name, _)| name == wanted).unwrap_or_else(|| panic!("no {wanted}")).1.shallow_clone()
}

fn record(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name).with_extension("json")).unwrap()).unwrap()
}

/// The largest difference of two logits over the largest logit.
fn error(ours: &Tensor, original: &Tensor) -> f64 {
    let span = original.abs().max().double_value(&[]);
    (ours - original).abs().max().double_value(&[]) / span
}

fn logits(checkpoint: &Checkpoint, input: &Tensor) -> Tensor {
    let model = checkpoint.load(Placement::CPU_F32, 512, &mut |_| {}).unwrap();
    tch::no_grad(|| model.logits(&model.hidden(input, checkpoint.config.attention).unwrap()).unwrap())
}

/// The file itself, and the folder that importing it gives.
fn both(name: &str) -> (Checkpoint, Checkpoint, tempfile::TempDir) {
    let path = fixture(&format!("{name}.gguf"));
    let folder = tempfile::tempdir().unwrap();
    import(&path, folder.path(), Dtype::F32, &mut |_| {}).unwrap();
    (Checkpoint::open(&path).unwrap(), Checkpoint::open(folder.path()).unwrap(), folder)
}

#[test]
fn every_type_unpacks_to_the_bits_that_ggml_has() {
    let reference = tensors("blocks.safetensors");
    for block in Block::ALL {
        let bytes: Vec<u8> = reference(&format!("{block:?}.bytes")).flatten(0, -1).try_into().unwrap();
        let values: Vec<f32> = reference(&format!("{block:?}.values")).try_into().unwrap();
        // A zero's sign aside.
        let bits = |values: &[f32]| values.iter().map(|x| (x + 0.0).to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&block.dequantize(&bytes)), bits(&values), "{block:?}");
    }
}

/// Within 1e-5 of the largest logit; every matrix is of another type, and queries and keys come in ggml's order of rows.
#[test]
fn logits_are_those_of_transformers_within_1e5() {
    for name in NETWORKS {
        let reference = tensors(&format!("{name}.safetensors"));
        let (direct, imported, _folder) = both(name);
        let ours = logits(&direct, &reference("input_ids"));
        let error = error(&ours, &reference("logits"));
        println!("{name}: {error:.1e}");
        assert!(error <= 1e-5, "{name}: {error}");
        // The layers' numbers are the same to the bit, whether weights stay in their blocks or became floats. A head in blocks adds them up in
        // another order.
        let hidden = |checkpoint: &Checkpoint| {
            let model = checkpoint.load(Placement::CPU_F32, 512, &mut |_| {}).unwrap();
            tch::no_grad(|| model.hidden(&reference("input_ids"), checkpoint.config.attention).unwrap())
        };
        assert_eq!(hidden(&imported), hidden(&direct), "{name}");
        assert!(self::error(&logits(&imported, &reference("input_ids")), &ours) <= 1e-6, "{name}");
    }
}

/// Floats of 16 bits that stay so, as those of models do that no cache keeps, and codes that are made of blocks: the same numbers.
#[test]
fn what_is_stored_in_fewer_bytes_is_the_same_network() {
    for name in NETWORKS {
        let input = tensors(&format!("{name}.safetensors"))("input_ids");
        let hidden = |checkpoint: &Checkpoint, scheme: Option<Scheme>| {
            let model = checkpoint.load_as(scheme, Placement::CPU_F32, 512, &mut |_| {}).unwrap();
            let hidden = tch::no_grad(|| model.hidden(&input, checkpoint.config.attention).unwrap());
            (hidden, model.weight_bytes())
        };
        let (direct, imported, folder) = both(name);
        assert_eq!(hidden(&direct, Some(Scheme::INT8)), hidden(&imported, Some(Scheme::INT8)), "{name}");
        let (blocks, floats) = (hidden(&direct, None).1, hidden(&imported, None).1);
        // The smaller one's embedding is its head as well, and held as floats beside it.
        let share = if name == "llama" { 2 } else { 1 };
        assert!(share * blocks < floats, "{name}: {blocks} and {floats} bytes");
        for dtype in [Dtype::Bf16, Dtype::F16] {
            import(&fixture(&format!("{name}.gguf")), folder.path(), dtype, &mut |_| {}).unwrap();
            let open = |halves: bool| {
                let checkpoint = Checkpoint::open(folder.path()).unwrap();
                Checkpoint { files: checkpoint.files.halves(halves), ..checkpoint }
            };
            let (short, long) = (hidden(&open(true), None), hidden(&open(false), None));
            assert_eq!(short.0, long.0, "{name} {dtype:?}");
            assert!(short.1 < long.1, "{name} {dtype:?}");
            let path = folder.path().join("model.safetensors");
            let widened: Vec<_> = Tensor::read_safetensors(&path).unwrap();
            let widened: Vec<_> = widened.into_iter().map(|(name, tensor)| (name, tensor.to_kind(Kind::Float))).collect();
            Tensor::write_safetensors(&widened, &path).unwrap();
            // Saved as f32, numbers of bf16 are known by their bits; those of f16 have more.
            let saved = hidden(&open(true), None);
            assert_eq!(saved, (long.0, if dtype == Dtype::Bf16 { short.1 } else { long.1 }), "{name} {dtype:?} as f32");
        }
    }
}

/// And of llama.cpp, for SentencePiece.
#[test]
fn tokens_are_those_of_transformers() {
    for name in ["llama", "qwen2", "spm"] {
        let path = fixture(&format!("{name}.gguf"));
        let tokenizer = if name == "spm" {
            // A vocabulary without a network opens, though it could not be loaded.
            Checkpoint::open(&path).unwrap().tokenizer
        } else {
            both(name).1.tokenizer
        };
        let record = record(name);
        for case in record["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            for (field, special) in [("ids", false), ("special", true)] {
                let ids: Vec<u32> = serde_json::from_value(case[field].clone()).unwrap();
                assert_eq!(tokenizer.encode(text, special).unwrap(), ids, "{name} {text:?} {field}");
            }
            // SentencePiece puts a space behind a special token too, and decoding cannot know that.
            if !text.starts_with("<s>") {
                let ids = tokenizer.encode(text, false).unwrap();
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{name}");
            }
        }
        if let Some(messages) = record["messages"].as_array() {
            let message = |json: &Value| {
                let text = |field: &str| json[field].as_str().unwrap().to_owned();
                Message { role: text("role"), content: text("content") }
            };
            let messages: Vec<_> = messages.iter().map(message).collect();
            assert_eq!(tokenizer.chat().unwrap().render(&messages).unwrap(), record["chat"].as_str().unwrap());
        }
    }
}

#[test]
fn file_and_folder_say_the_same() {
    for name in NETWORKS {
        let (direct, imported, folder) = both(name);
        let mut config = imported.config.clone();
        assert_eq!(config.dtype.take(), Some(Dtype::F32));
        assert_eq!(format!("{config:?}"), format!("{:?}", direct.config), "{name}");
        assert_eq!(format!("{:?}", imported.generation), format!("{:?}", direct.generation), "{name}");
        // The end of a turn ends a text too.
        let end = |text: &str| direct.tokenizer.token_id(text).unwrap();
        assert_eq!(direct.generation.eos_token_ids, [end("<|endoftext|>"), end("<|im_end|>")]);
        assert_eq!((direct.name().as_str(), direct.config.tied), (name, name == "qwen2"));
        assert_eq!(direct.problems(), [""; 0]);
        assert_eq!(folder.path().read_dir().unwrap().count(), 5, "nothing temporary is left");
    }
}

#[test]
fn weights_can_be_written_in_half_the_bytes() {
    let folder = tempfile::tempdir().unwrap();
    import(&fixture("llama.gguf"), folder.path(), Dtype::Bf16, &mut |_| {}).unwrap();
    let reference = tensors("llama.safetensors");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.config.dtype, Some(Dtype::Bf16));
    assert_eq!(checkpoint.files.stored_types().into_iter().collect::<Vec<_>>(), ["bf16"]);
    let error = error(&logits(&checkpoint, &reference("input_ids")), &reference("logits"));
    assert!(error > 1e-5 && error < 0.05, "{error}");
}

// ------------------------------------------------------------------------------------ files made to order

/// Writes metadata, and tensors without data but for what `tail` has.
#[derive(Clone, Default)]
struct Maker {
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    tail: Vec<u8>,
}

fn sized(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Maker {
    fn set(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.keys.retain(|(name, _)| name != key);
        self.keys.push((key.into(), [&kind.to_le_bytes(), value].concat()));
        self
    }

    fn text(self, key: &str, value: &str) -> Self {
        self.set(key, 8, &sized(value))
    }

    fn number(self, key: &str, value: u32) -> Self {
        self.set(key, 4, &value.to_le_bytes())
    }

    fn float(self, key: &str, value: f32) -> Self {
        self.set(key, 6, &value.to_le_bytes())
    }

    fn texts(self, key: &str, values: &[&str]) -> Self {
        let texts: Vec<u8> = values.iter().flat_map(|value| sized(value)).collect();
        self.set(key, 9, &[8u32.to_le_bytes().as_slice(), &(values.len() as u64).to_le_bytes(), &texts].concat())
    }

    fn tensor(mut self, name: &str, sizes: &[u64], kind: u32, at: u64) -> Self {
        self.tensors.push((name.into(), sizes.into(), kind, at));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            bytes.extend([sized(key), value.clone()].concat());
        }
        for (name, sizes, kind, at) in &self.tensors {
            bytes.extend(sized(name));
            bytes.extend((sizes.len() as u32).to_le_bytes());
            sizes.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
            bytes.extend([kind.to_le_bytes().as_slice(), &at.to_le_bytes()].concat());
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.tail);
        bytes
    }

    fn write(&self) -> tempfile::NamedTempFile {
        let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        std::fs::write(file.path(), self.bytes()).unwrap();
        file
    }

    fn open(&self) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open(self.write().path())
    }

    fn error(&self) -> String {
        match self.open() {
            Ok(_) => panic!("the broken file was opened"),
            Err(error) => error.to_string(),
        }
    }
}

/// A llama of one head of 8 and three tokens, as far as opening it asks.
fn small() -> Maker {
    let maker = Maker { tail: vec![0; 4096], ..Maker::default() };
    maker
        .text("general.architecture", "llama")
        .number("llama.context_length", 32)
        .number("llama.embedding_length", 8)
        .number("llama.block_count", 1)
        .number("llama.feed_forward_length", 8)
        .number("llama.attention.head_count", 1)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .texts("tokenizer.ggml.tokens", &["a", "b", "ab"])
        .texts("tokenizer.ggml.merges", &["a b"])
        .tensor("token_embd.weight", &[8, 3], 0, 0)
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    assert_eq!(small().open().unwrap().tokenizer.encode("abba", false).unwrap(), [2, 1, 0]);
    let cases: Vec<(Maker, &str)> = vec![
        (small().text("general.architecture", "mamba"), "architecture mamba cannot be read from GGUF: llama and qwen2 can"),
        (small().number("llama.expert_count", 8), "a mixture of 8 experts"),
        (small().number("llama.attention.sliding_window", 64), "key llama.attention.sliding_window is not known"),
        (
            small().text("llama.rope.scaling.type", "yarn").float("llama.rope.scaling.factor", 4.0),
            "llama.rope.scaling.type = yarn",
        ),
        (small().number("llama.rope.dimension_count", 4), "llama.rope.dimension_count = 4 is not the head's size of 8"),
        (small().number("llama.attention.head_count", 3), "llama.embedding_length = 8 is not a multiple"),
        (small().number("llama.attention.head_count", 0), "llama.embedding_length = 8 is not a multiple"),
        (small().text("llama.block_count", "one"), "key llama.block_count is not a count"),
        (small().number("llama.block_count", 0), "num_hidden_layers = 0 is not"),
        (small().text("tokenizer.ggml.model", "t5"), "tokenizer.ggml.model = t5 cannot be read: gpt2 and llama can"),
        (small().text("tokenizer.ggml.pre", "tekken"), "tokenizer.ggml.pre = tekken is not known: gpt-2, "),
        (small().texts("tokenizer.ggml.tokens", &["a", "b", "a"]), "tokens 0 and 2 are both \"a\""),
        (small().texts("tokenizer.ggml.merges", &["ab"]), "merge \"ab\" is not two tokens"),
        (small().texts("tokenizer.ggml.merges", &["a c"]), "`c` out of vocabulary"),
        (small().number("tokenizer.ggml.eos_token_id", 3), "tokenizer.ggml.eos_token_id = 3 is not one of 3 tokens"),
        (small().set("tokenizer.ggml.add_bos_token", 7, &[1]), "texts need a bos token"),
        (small().set("tokenizer.ggml.tokens", 8, &sized("a")), "key tokenizer.ggml.tokens is not an array of texts"),
        (small().text("tokenizer.chat_template", "{% for %}"), "chat template"),
        (small().number("split.count", 3), "it is one of 3 parts"),
        (small().number("general.alignment", 7), "general.alignment"),
        (small().tensor("output.weight", &[256, 1], 10, 96), "tensor output.weight: type Q2_K cannot be read: F32, F16, "),
        (small().tensor("output.weight", &[8, 3], 99, 96), "tensor output.weight: type number 99 cannot be read"),
        (
            small().tensor("output.weight", &[8, 3], 8, 96),
            "tensor output.weight: has rows of 8, which are no whole blocks of 32",
        ),
        (small().tensor("output.weight", &[8, 0], 0, 96), "tensor output.weight: cannot have the shape [0, 8]"),
        (small().tensor("output.weight", &[u64::MAX, 2], 0, 96), "tensor output.weight: cannot have the shape"),
        (small().tensor("output.weight", &[8, 1 << 40], 0, 96), "tensor output.weight ends behind the file's"),
        (small().tensor("output.weight", &[8, 3], 0, u64::MAX - 8), "tensor output.weight"),
        (small().tensor("output.weight", &[8, 3], 0, 100), "tensor output.weight does not lie on a multiple of 32 bytes"),
        (small().tensor("output.weight", &[8, 3, 1, 1, 1], 0, 96), "tensor output.weight: has 5 dimensions"),
        (small().tensor("token_embd.weight", &[8, 3], 0, 96), "tensor token_embd.weight is there twice"),
    ];
    for (maker, told) in cases {
        let error = maker.error();
        assert!(error.contains(told), "{told}: {error}");
        assert!(error.contains(".gguf: "), "{error}");
    }
}

#[test]
fn a_file_that_is_none_and_versions_that_are_not_read_are_told_apart() {
    let start = |bytes: &[u8]| Gguf::parse([bytes, &[0; 64]].concat()).err().unwrap();
    assert!(start(b"PK\x03\x04").contains("it is no GGUF file"));
    assert!(start(b"GGUF\x01\0\0\0").contains("version 1"));
    assert!(start(b"GGUF\0\0\0\x03").contains("big-endian"));
    assert!(start(b"GGUF\x09\0\0\0").contains("version 9"));
    assert!(Gguf::parse(b"GGUF\x03\0\0\0".as_slice()).is_err());
}

/// Counts and lengths that the file cannot hold: an error at once, and nothing allocated for them.
#[test]
fn absurd_counts_are_errors() {
    let array = |kind: u32, count: u64| [kind.to_le_bytes().as_slice(), &count.to_le_bytes()].concat();
    for count in [1 << 20, 1 << 40, u64::MAX / 4, u64::MAX] {
        for kind in [0, 4, 8, 10] {
            let error = small().set("tokenizer.ggml.token_type", 9, &array(kind, count)).error();
            assert!(error.contains("key tokenizer.ggml.token_type: "), "{kind} {count}: {error}");
        }
        let error = small().set("general.name", 8, &count.to_le_bytes()).error();
        assert!(error.contains("key general.name: "), "{count}: {error}");
        for at in [8, 16] {
            let mut bytes = small().bytes();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            assert!(Gguf::parse(bytes).is_err());
        }
    }
    assert!(small().set("x", 9, &array(9, 1)).error().contains("key x: is an array of type 9"));
    assert!(small().set("x", 13, &[]).error().contains("key x: is of type 13"));
}

/// Llama 3's divisors of the rotary frequencies become its `rope_scaling`; any other divisors are refused.
#[test]
fn rope_frequencies_are_understood_or_refused() {
    let (theta, factor, dim) = (500_000f64, 8.0, 64);
    let divisors: Vec<f32> = (0..dim / 2)
        .map(|pair| {
            // As llama.cpp's converter has it.
            let wavelength = 2.0 * std::f64::consts::PI * theta.powf(2.0 * pair as f64 / dim as f64);
            let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
            match wavelength {
                w if w < 8192.0 / 4.0 => 1.0,
                w if w > 8192.0 / 1.0 => factor,
                _ => 1.0 / ((1.0 - smooth) / factor + smooth),
            }
        })
        .map(|x| x as f32)
        .collect();
    let with = |divisors: &[f32]| {
        let mut maker = small().float("llama.rope.freq_base", theta as f32).number("llama.attention.key_length", dim as u32);
        maker = maker.tensor("rope_freqs.weight", &[divisors.len() as u64], 0, 128);
        divisors.iter().enumerate().for_each(|(i, x)| maker.tail[128 + 4 * i..][..4].copy_from_slice(&x.to_le_bytes()));
        maker
    };
    assert!(divisors.iter().any(|x| *x > 1.0 && *x < 8.0) && divisors.contains(&1.0) && divisors.contains(&8.0));
    let scaling = |divisors: &[f32]| format!("{:?}", with(divisors).open().unwrap().config.rope_scaling);
    assert_eq!(scaling(&divisors), "Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 }");
    assert_eq!(scaling(&[1.0; 32]), "None");
    let mut other = divisors.clone();
    other[12] *= 1.01;
    assert!(with(&other).error().contains("another rule than Llama 3's"));
    assert!(with(&divisors[1..]).error().contains("rope_freqs.weight has 31 numbers for 32 pairs"));
    let linear = with(&[1.0; 32]).float("llama.rope.scaling.factor", 2.0).open().unwrap();
    assert_eq!(format!("{:?}", linear.config.rope_scaling), "Linear { factor: 2.0 }");
}

#[test]
fn a_tensor_too_few_or_too_many_is_a_problem_with_a_name() {
    let problems = small().tensor("blk.0.attn_rot_embd.weight", &[8], 0, 96).open().unwrap().problems();
    assert!(problems.contains(&"tensor model.layers.0.self_attn.q_proj.weight is missing".to_owned()), "{problems:?}");
    assert!(problems.contains(&"tensor blk.0.attn_rot_embd.weight is unexpected".to_owned()), "{problems:?}");
    let folder = tempfile::tempdir().unwrap();
    let error = import(small().write().path(), &folder.path().join("new"), Dtype::F32, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("model.layers.0.self_attn.q_proj.weight is missing"), "{error}");
    assert!(!folder.path().join("new").exists());
}

/// What breaks halfway leaves no folder that opens, not even where another model was before.
#[test]
fn a_failed_import_leaves_no_model() {
    let mut bytes = std::fs::read(fixture("qwen2.gguf")).unwrap();
    let end = bytes.len();
    // The file's last tensor is the last norm, in f32.
    bytes[end - 256..end - 252].copy_from_slice(&f32::NAN.to_le_bytes());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    import(&fixture("llama.gguf"), folder.path(), Dtype::F32, &mut |_| {}).unwrap();
    let error = import(file.path(), folder.path(), Dtype::F32, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight holds NaN or infinity"), "{error}");
    assert!(Checkpoint::open(folder.path()).is_err());
}

/// Whether a matrix stays in its blocks or becomes floats.
#[test]
fn a_scale_that_is_no_number_is_refused() {
    let whole = std::fs::read(fixture("llama.gguf")).unwrap();
    let gguf = Gguf::parse(whole.clone()).unwrap();
    let scaled = |name: &&String| gguf.tensors()[*name].block.group() == Some(32) && name.ends_with("weight");
    let names: Vec<&String> = gguf.tensors().keys().filter(scaled).collect();
    assert!(names.len() > 4);
    for name in names {
        let mut bytes = whole.clone();
        let start = gguf.tensors()[name].range.start;
        bytes[start..start + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let placement = Placement { dtype, ..Placement::CPU_F32 };
            let checkpoint = Checkpoint::open(file.path()).unwrap();
            let error = checkpoint.load(placement, 64, &mut |_| {}).map(drop).unwrap_err().to_string();
            assert!(error.contains("holds NaN or infinity"), "{name} {dtype:?}: {error}");
        }
    }
}

/// Every cut of the header, and a selection behind it.
#[test]
fn a_truncated_file_is_an_error() {
    let whole = std::fs::read(fixture("qwen2.gguf")).unwrap();
    let header = 7_072;
    for length in (0..header).step_by(7).chain((header..whole.len()).step_by(997)).chain([whole.len() - 33]) {
        assert!(Gguf::parse(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
    }
    assert!(Gguf::parse(&whole).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Flipped bits: an error or another model, but never a panic. Where it still opens, loading it must not panic either.
    #[test]
    fn flipped_bits_do_no_harm(flips in prop::collection::vec((0usize..7_072, 0u8..8), 1..4)) {
        let mut bytes = std::fs::read(fixture("qwen2.gguf")).unwrap();
        for (at, bit) in flips {
            bytes[at] ^= 1 << bit;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(file.path()) {
            let _ = checkpoint.load(Placement::CPU_F32, 64, &mut |_| {});
            let _ = checkpoint.tokenizer.encode("The quick <tool> 12\n", true);
        }
    }

    /// Words of the header replaced: the values that overflow what is computed from them.
    #[test]
    fn extreme_words_do_no_harm(
        at in 4usize..7_072,
        word in prop::sample::select(vec![0, 1, u32::MAX as u64, 1 << 32, 1 << 62, u64::MAX - 31, u64::MAX]),
    ) {
        let mut bytes = std::fs::read(fixture("qwen2.gguf")).unwrap();
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        if let Ok(gguf) = Gguf::parse(bytes) {
            for info in gguf.tensors().values() {
                let values = info.block.dequantize(gguf.tensor_bytes(info));
                prop_assert_eq!(values.len() as i64, info.shape.iter().product::<i64>());
            }
        }
    }
}

#[test]
fn half_precision_is_what_libtorch_means_by_it() {
    let reference = tensors("blocks.safetensors");
    for (block, kind) in [(Block::F16, Kind::Half), (Block::BF16, Kind::BFloat16)] {
        let bytes: Vec<u8> = reference(&format!("{block:?}.bytes")).flatten(0, -1).try_into().unwrap();
        let ours = Tensor::from_slice(&block.dequantize(&bytes));
        assert_eq!(ours, Tensor::from_data_size(&bytes, &[bytes.len() as i64 / 2], kind).to_kind(Kind::Float));
    }
}
