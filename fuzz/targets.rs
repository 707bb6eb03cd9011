//! What the fuzzers call, and `tests/fuzz.rs` for a few seconds: each takes any bytes and panics only where lacuna is wrong.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use lacuna::checkpoint::Checkpoint;
use lacuna::checkpoint::gguf;
use lacuna::checkpoint::gguf::reader::Gguf;
use lacuna::checkpoint::tokenizer::Tokenizer;
use lacuna::checkpoint::weights::WeightFiles;
use lacuna::engine::request::{ModelInfo, PRIORITY_MAX, STOPS_MAX};
use lacuna::engine::text::Detokenizer;
use lacuna::service::proto::GenerateRequest;
use lacuna::tensor::Placement;
use prost::Message;
use tonic::Code;

/// Name and body of a fuzzer.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 5] =
    [("request", request), ("safetensors", safetensors), ("gguf", gguf), ("detokenize", detokenize), ("stops", stops)];

fn root() -> PathBuf {
    // The fuzzers' own crate lies in a folder of this one.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    if here.ends_with("fuzz") { here.join("..") } else { here.into() }
}

static MODELS: LazyLock<Vec<ModelInfo>> = LazyLock::new(|| {
    let open = |name: &str| {
        let checkpoint = Checkpoint::open(&root().join("models").join(name)).expect("the model that ships opens");
        let network = checkpoint.load(Placement::CPU_F32, checkpoint.config.max_positions, &mut |_| {}).expect("and loads");
        ModelInfo::new(checkpoint, &network, vec![])
    };
    ["nano", "nano-block", "nano-ar"].map(open).into()
});

fn tokenizer() -> &'static Tokenizer {
    &MODELS[0].tokenizer
}

/// A message from the wire is refused with a status that fits a header, or becomes a request that fits its model.
pub fn request(data: &[u8]) {
    let Ok(message) = GenerateRequest::decode(data) else { return };
    for model in MODELS.iter() {
        let deadline = Instant::now() + Duration::from_secs(1);
        match lacuna::service::check(model, message.clone(), "fuzz".into(), deadline) {
            Ok(request) => {
                assert!(request.canvas.sequence().len() <= model.context, "{message:?}");
                assert!(request.stops.len() <= STOPS_MAX && request.stops.iter().all(|stop| !stop.is_empty()), "{message:?}");
                let vocabulary = model.config.vocab_size;
                assert!(request.canvas.sequence().iter().all(|id| (*id as usize) < vocabulary), "{message:?}");
                assert!(request.tokens() > 0);
                assert!((-PRIORITY_MAX..=PRIORITY_MAX).contains(&request.priority), "{message:?}");
            }
            Err(status) => {
                assert!([Code::InvalidArgument, Code::FailedPrecondition].contains(&status.code()), "{status:?}: {message:?}");
                assert!(status.message().len() < 4096 && !status.details().is_empty(), "{status:?}: {message:?}");
            }
        }
    }
}

/// A weight file is refused, or its tensors can be loaded.
pub fn safetensors(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("model.safetensors"), data).expect("a file");
    let Ok(files) = WeightFiles::open(folder.path()) else { return };
    assert!(files.bytes() <= data.len(), "its tensors are larger than the file");
    // Whatever a network may want of it.
    for name in ["model.embed_tokens.weight", "a", ""] {
        if let Ok(tensor) = files.load(name, Placement::CPU_F32) {
            assert!(tensor.numel() <= data.len());
        }
    }
}

/// A GGUF file is refused, or every tensor lies within it.
pub fn gguf(data: &[u8]) {
    if let Ok(parsed) = Gguf::parse(data) {
        for info in parsed.tensors().values() {
            assert_eq!(parsed.tensor_bytes(info).len(), info.range.len());
        }
    } else {
        return;
    }
    // Settings and vocabulary too.
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), data).expect("its bytes");
    if let Ok((folder, _)) = gguf::open(file.path()) {
        assert!(folder.config.is_object() && folder.tokenizer.is_object());
    }
}

/// Tokens in parts that end where the bytes say: what is released joins to the text of all.
pub fn detokenize(data: &[u8]) {
    let (ids, cuts) = tokens(data);
    let whole = tokenizer().decode(&ids, false).expect("tokens of the vocabulary");
    let (text, given, stopped) = released(vec![], &ids, &cuts);
    assert_eq!((text, given, stopped), (whole, ids, false));
}

/// Text behind up to four stop strings: nothing at or behind the first of them that is complete is released.
pub fn stops(data: &[u8]) {
    let Some((head, data)) = data.split_at_checked(5) else { return };
    let (mut stops, mut rest) = (vec![], data);
    for length in &head[..4] {
        let (stop, more) = rest.split_at(usize::from(length % 9).min(rest.len()));
        let stop = String::from_utf8_lossy(stop).into_owned();
        stops.extend((!stop.is_empty()).then_some(stop));
        rest = more;
    }
    let text = String::from_utf8_lossy(rest);
    let Ok(ids) = tokenizer().encode(&text, false) else { return };
    let whole = tokenizer().decode(&ids, false).expect("tokens of the vocabulary");
    let cuts: Vec<usize> = (0..ids.len()).filter(|at| at % (usize::from(head[4]) + 1) == 0).collect();
    let found = stops.iter().filter_map(|stop| Some((whole.find(stop.as_str())?, stop.len())));
    let first = found.min_by_key(|(at, length)| at + length);
    let expected = first.map_or(whole.as_str(), |(at, _)| &whole[..at]);
    let (text, _, stopped) = released(stops.clone(), &ids, &cuts);
    assert_eq!((text.as_str(), stopped), (expected, first.is_some()), "{stops:?} in {whole:?}, cut at {cuts:?}");
}

/// Two bytes for a token; the topmost bit says that a part ends behind it.
fn tokens(data: &[u8]) -> (Vec<u32>, Vec<usize>) {
    let words = data.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let vocabulary = tokenizer().size() as u32;
    let ids = words.clone().map(|word| u32::from(word & 0x7fff) % vocabulary).collect();
    (ids, words.enumerate().filter(|(_, word)| word & 0x8000 != 0).map(|(at, _)| at + 1).collect())
}

/// What a detokeniser releases of `ids` in parts that end at `cuts`.
fn released(stops: Vec<String>, ids: &[u32], cuts: &[usize]) -> (String, Vec<u32>, bool) {
    let mut detokenizer = Detokenizer::new(stops);
    let (mut text, mut given, mut start) = (String::new(), vec![], 0);
    let ends = cuts.iter().copied().filter(|cut| *cut < ids.len()).chain([ids.len()]);
    for end in ends {
        let released = detokenizer.push(tokenizer(), &ids[start..end], end == ids.len()).expect("tokens of the vocabulary");
        text.push_str(&released.text);
        given.extend(released.token_ids);
        if released.stopped {
            return (text, given, true);
        }
        start = end;
    }
    (text, given, false)
}
