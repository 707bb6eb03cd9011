//! What is decoded together: a request's text is the same whoever is beside it, nobody's trouble is another's, budgets hold, and what
//! requests begin with alike is computed once.

mod common;

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::{F32, TOKENIZER, llama_config};
use lacuna::checkpoint::Checkpoint;
use lacuna::decode::autoregressive::{Autoregressive, DrafterKind};
use lacuna::decode::canvas::{Canvas, Piece};
use lacuna::decode::{Decoder, FinishReason, RowStatistics, Step, Wanted, Window};
use lacuna::draft::Drafters;
use lacuna::engine::request::{
    AutoregressiveOptions, CacheChoice, DiffusionOptions, DrafterChoice, GenerateOptions, ModelInfo, Prompt, SamplingOptions,
    validate,
};
use lacuna::engine::runner::{self, Member, Residence};
use lacuna::engine::sequence::Sequence;
use lacuna::engine::{Engine, Event, Failure, Limits, Method, Refused, Request, Usage};
use lacuna::model::quantized::Scheme;
use lacuna::model::{RandomWeights, Transformer};
use lacuna::tensor::{Device, Dtype, Placement};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BF16: Placement = Placement { device: Device::Cpu, dtype: Dtype::Bf16 };

/// One of the models that ship, with the drafters that do.
fn start(name: &str, placement: Placement, limits: Limits) -> (ModelInfo, Engine) {
    start_as(name, None, placement, limits)
}

fn start_as(name: &str, scheme: Option<Scheme>, placement: Placement, limits: Limits) -> (ModelInfo, Engine) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let network = checkpoint.load_as(scheme, placement, 4096, &mut |_| {}).unwrap();
    let drafters = Drafters::load(&folder.join("drafters"), network.config(), placement).unwrap();
    let model = ModelInfo::new(checkpoint, &network, drafters.infos());
    let engine = Engine::start(network, drafters, model.tokenizer.clone(), limits).unwrap();
    (model, engine)
}

fn many() -> Limits {
    Limits { resident: 32, queued: 256, ..Limits::default() }
}

fn options(prompt: String, length: u64) -> GenerateOptions {
    GenerateOptions {
        id: "test".into(),
        prompt: Prompt::Text(prompt),
        template: vec![],
        max_new_tokens: Some(length),
        method: None,
        diffusion: DiffusionOptions::default(),
        autoregressive: AutoregressiveOptions::default(),
        sampling: SamplingOptions { seed: Some(5), ..SamplingOptions::default() },
        stops: vec![],
        steps: false,
        deadline: None,
        priority: 0,
    }
}

/// Requests of every kind and of many lengths.
fn mixed(model: &ModelInfo, count: u64) -> Vec<Request> {
    let verbs = ["Return the sum of", "Count", "Return the largest of", "Return the product of"];
    let request = |index: u64| {
        let verb = verbs[index as usize % verbs.len()];
        let prompt = format!("# {verb} the numbers in xs that are greater than {}.\ndef solve(xs):\n", index * 7 % 50);
        let mut options = options(prompt.repeat(1 + index as usize % 3), 16 + index * 5 % 32);
        options.sampling.seed = Some(index);
        options.sampling.temperature = Some([0.0, 0.0, 0.8, 1.2][index as usize / 2 % 4]);
        options.sampling.top_p = (index % 5 == 3).then_some(0.9);
        if model.name == "nano" {
            let (length, cache) = ([8, 16, 48][index as usize % 3], [CacheChoice::Off, CacheChoice::Dual, CacheChoice::Prefix]);
            options.diffusion.block_length = Some(length);
            options.diffusion.cache = Some(cache[index as usize / 2 % 3]);
            options.diffusion.threshold = Some([0.9, 0.99][index as usize % 2]);
            options.diffusion.cfg_scale = (index % 7 == 6).then_some(0.5).filter(|_| (index / 2).is_multiple_of(3));
        } else if model.name == "nano-block" {
            options.diffusion.cache = (index % 5 == 4).then_some(CacheChoice::Off);
            options.diffusion.threshold = (!index.is_multiple_of(3)).then_some([0.9, 0.99][index as usize % 2]);
        } else {
            let kinds = [None, Some(DrafterKind::Redrafter), None, Some(DrafterKind::Medusa), Some(DrafterKind::Lookup)];
            options.autoregressive.drafter = kinds[index as usize % 5].map(DrafterChoice::Use);
            options.autoregressive.prefill_chunk = [None, Some(5), Some(17)][index as usize % 3];
            options.sampling.repetition_penalty = (index % 6 == 5).then_some(1.3);
        }
        validate(model, options).unwrap()
    };
    (0..count).map(request).collect()
}

type Events = tokio::sync::mpsc::Receiver<Result<Event, Failure>>;

fn collect(mut events: Events) -> (String, Vec<u32>, Usage) {
    let (mut text, mut ids) = (String::new(), vec![]);
    while let Some(event) = events.blocking_recv() {
        match event.unwrap() {
            Event::Committed { token_ids, text: more, .. } => {
                ids.extend(token_ids);
                text.push_str(&more);
            }
            Event::Finished { usage, .. } => return (text, ids, usage),
            _ => {}
        }
    }
    panic!("the stream ended without a finish");
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Alone, in batches of 2, 8 and 32, and joining one after another while others are in the middle of theirs.
#[test]
fn a_text_is_the_same_alone_and_in_any_company() {
    for (name, placement, scheme) in [
        ("nano", F32, None),
        ("nano-ar", F32, None),
        ("nano-block", F32, None),
        ("nano", BF16, None),
        ("nano-ar", BF16, None),
        ("nano", F32, Some(Scheme::INT8)),
        ("nano-ar", BF16, Some(Scheme::INT8)),
        ("nano-ar", F32, Some(Scheme::INT4)),
    ] {
        let (model, engine) = start_as(name, scheme, placement, many());
        let requests = mixed(&model, 32);
        let submit = |request: &Request| engine.submit(request.clone()).unwrap();
        let ids = |events: Events| collect(events).1;
        let alone: Vec<Vec<u32>> = requests.iter().map(|request| ids(submit(request))).collect();
        assert!(alone.iter().filter(|ids| ids.len() > 8).count() > 16, "{name}: there is too little text to compare");
        for size in [2, 8, 32] {
            let before = engine.load();
            for (batch, alone) in requests.chunks(size).zip(alone.chunks(size)) {
                let together: Vec<Events> = batch.iter().map(submit).collect();
                let together: Vec<Vec<u32>> = together.into_iter().map(ids).collect();
                assert_eq!(together, alone, "{name}, {placement:?}, batches of {size}");
            }
            let (after, shared) = (engine.load(), size as f64 / 4.0);
            let steps = (after.steps - before.steps) as f64 / (after.rounds - before.rounds) as f64;
            assert!(
                steps > shared.max(1.0),
                "{steps} steps a round: batches of {size} did not run together ({})",
                model.precision()
            );
        }
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut late: Vec<(usize, Events)> = vec![];
        for index in (0..32).rev() {
            late.push((index, submit(&requests[index])));
            std::thread::sleep(Duration::from_micros(rng.random_range(0..4000)));
        }
        for (index, events) in late {
            assert_eq!(ids(events), alone[index], "{name}, {placement:?}, request {index}, joining late");
        }
    }
}

/// A decoder that goes wrong in its third window.
struct Broken {
    inner: Autoregressive,
    how: How,
    windows: std::cell::Cell<usize>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum How {
    Not,
    NotFinite,
    NoSuchToken,
    Panics,
    TooLong,
}

impl Decoder for Broken {
    fn window(&self) -> Window {
        let mut window = self.inner.window();
        self.windows.set(self.windows.get() + 1);
        if self.windows.get() == 3 {
            match self.how {
                How::NotFinite => window.sampling.forbidden = (0..20).collect(),
                How::NoSuchToken => window.tokens = vec![99],
                How::TooLong => {
                    window.tokens = vec![1; 400];
                    window.wanted = Wanted::Following(vec![399]);
                }
                How::Panics | How::Not => {}
            }
        }
        window
    }

    fn advance(&mut self, rows: &[RowStatistics]) -> Step {
        assert!(self.how != How::Panics || self.windows.get() < 3, "as the test wants it");
        self.inner.advance(rows)
    }

    fn finished(&self) -> Option<FinishReason> {
        self.inner.finished()
    }

    fn canvas(&self) -> &Canvas {
        self.inner.canvas()
    }

    fn cache_room(&self) -> usize {
        self.inner.cache_room()
    }

    fn kept(&self) -> &[usize] {
        self.inner.kept()
    }
}

/// Decodes side by side; the tokens of each, or what went wrong.
fn together(model: &Transformer, hows: &[How]) -> Vec<Result<Vec<u32>, String>> {
    let sequence = |(index, how): (usize, &How)| {
        let canvas = Canvas::new(&[1 + index as u32, 5, 9], &[Piece::Hole(8 + index)], 0);
        let inner = Autoregressive::new(common::plain(), canvas, None);
        let decoder = Broken { inner, how: *how, windows: std::cell::Cell::new(0) };
        let sequence = Sequence::new(Box::new(decoder), vec![], vec![], Duration::ZERO);
        let residence = Residence::new(model, &sequence).unwrap();
        (sequence, residence, Ok(()))
    };
    let mut all: Vec<(Sequence, Residence, Result<(), String>)> = hows.iter().enumerate().map(sequence).collect();
    for _ in 0..20 {
        let mut members = vec![];
        let mut places = vec![];
        for (index, (sequence, residence, state)) in all.iter_mut().enumerate() {
            if let (Ok(()), Some(window)) = (&state, sequence.window()) {
                members.push(Member { sequence, residence, window });
                places.push(index);
            }
        }
        let results = runner::round(model, &Drafters::default(), members, &TOKENIZER, None);
        for (place, result) in places.into_iter().zip(results) {
            all[place].2 = result.map(drop).map_err(|reason| reason.to_string());
        }
    }
    let tokens = |(sequence, _, state): (Sequence, Residence, Result<(), String>)| {
        state.map(|()| sequence.decoder().canvas().tokens().to_vec())
    };
    all.into_iter().map(tokens).collect()
}

#[test]
fn one_that_breaks_ends_and_the_others_do_not_notice() {
    let model = Transformer::new(&llama_config(20, 16, 1), F32, 256, &mut RandomWeights { placement: F32 }).unwrap();
    let well = together(&model, &[How::Not; 8]);
    assert!(well.iter().all(|tokens| tokens.is_ok()));
    let hows = [How::Not, How::NotFinite, How::Not, How::NoSuchToken, How::Panics, How::Not, How::TooLong, How::Not];
    let found = together(&model, &hows);
    for ((how, found), well) in hows.iter().zip(&found).zip(&well) {
        let reason = found.as_ref().err().cloned().unwrap_or_default();
        match how {
            How::Not => assert_eq!(found, well),
            How::NotFinite => assert!(reason.contains("not finite"), "{reason}"),
            How::NoSuchToken => assert!(reason.contains("outside the vocabulary"), "{reason}"),
            How::Panics => assert!(reason.contains("panicked"), "{reason}"),
            How::TooLong => assert!(reason.contains("exceed"), "{reason}"),
        }
    }
}

/// What the engine logs.
static LOG: Mutex<Vec<u8>> = Mutex::new(vec![]);

struct Log;

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// In an engine: the request that fails is told so, the log has its id and the reason, and all others go on.
#[test]
fn one_request_that_fails_takes_nobody_with_it() {
    tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).init();
    for name in ["nano-ar", "nano"] {
        let (model, engine) = start(name, F32, many());
        let mut requests = mixed(&model, 8);
        let alone: Vec<Vec<u32>> = requests.iter().map(|request| collect(engine.submit(request.clone()).unwrap()).1).collect();
        // With no token left to choose none has a finite logit.
        let all = 0..model.config.vocab_size as u32;
        match &mut requests[3].method {
            Method::Autoregressive(parameters) => parameters.sampling.forbidden.extend(all),
            Method::Diffusion(parameters) => parameters.sampling.forbidden.extend(all),
            Method::Scoring(_) => unreachable!(),
        }
        requests[3].id = format!("one-that-fails-in-{name}");
        let events: Vec<Events> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        for (index, (mut events, alone)) in events.into_iter().zip(&alone).enumerate() {
            if index == 3 {
                let last = std::iter::from_fn(|| events.blocking_recv()).last();
                assert!(matches!(last, Some(Err(Failure::Internal))), "{last:?}");
            } else {
                assert_eq!(collect(events).1, *alone, "{name}, request {index}");
            }
        }
        wait("its place is not free", || engine.active() == 0);
        assert_eq!(collect(engine.submit(requests[0].clone()).unwrap()).1, alone[0], "{name}: the engine goes on");
        let log = String::from_utf8(LOG.lock().unwrap().clone()).unwrap();
        let told = log.lines().find(|line| line.contains(&requests[3].id)).unwrap_or_default();
        assert!(told.contains("ERROR") && told.contains("not finite"), "{log}");
    }
}

#[test]
fn a_beginning_that_was_seen_before_is_not_computed_again() {
    let (model, engine) = start("nano-ar", F32, Limits { prefix_tokens: Some(128), ..many() });
    let (_, cold) = start("nano-ar", F32, Limits { prefix_tokens: Some(0), ..many() });
    let system =
        "# You write short functions in Python, on one line where it can be, and nothing else at all.\n# No comment.\n";
    let mut reused = vec![];
    for number in 0..6 {
        let task = format!("# Return the sum of the numbers in xs that are greater than {number}.\ndef solve(xs):\n");
        let asked = || {
            let mut options = options(format!("{system}{task}"), 24);
            options.sampling.temperature = Some(f64::from(number % 2) * 0.9);
            validate(&model, options).unwrap()
        };
        let ((_, ids, usage), (_, expected, computed)) =
            (collect(engine.submit(asked()).unwrap()), collect(cold.submit(asked()).unwrap()));
        assert_eq!(ids, expected, "task {number}");
        assert_eq!((computed.reused_tokens, usage.prompt_tokens), (0, computed.prompt_tokens));
        reused.push(usage.reused_tokens);
        assert!(engine.load().prefix_tokens <= 128);
    }
    let shared = model.tokenizer.encode(system, false).unwrap().len();
    assert!(reused[0] == 0 && reused[1..].iter().all(|reused| *reused >= shared / 16 * 16), "{reused:?} of {shared}");
    assert_eq!(cold.load().prefix_tokens, 0);
}

#[test]
fn the_store_of_beginnings_gives_way_to_those_who_need_the_room() {
    let limits = Limits { tokens: Some(200), prefix_tokens: Some(200), ..many() };
    let (model, engine) = start("nano-ar", F32, limits);
    let long = |salt: u32, length: u64| {
        let mut options = options(String::new(), length);
        options.prompt = Prompt::Tokens((0..100).map(|at| (at * 7 + salt * (at + 1)) % 900 + 2).collect());
        validate(&model, options).unwrap()
    };
    collect(engine.submit(long(0, 2)).unwrap());
    assert!(engine.load().prefix_tokens >= 96);
    collect(engine.submit(long(1, 90)).unwrap());
    // 191 of 200 tokens were its own.
    assert!(engine.load().prefix_tokens <= 200 - 191);
    assert_eq!(collect(engine.submit(long(0, 2)).unwrap()).2.reused_tokens, 0, "the first beginning had to go");
}

#[test]
fn tokens_are_a_budget() {
    let limits = Limits { resident: 16, queued: 16, tokens: Some(150), queued_tokens: Some(120), prefix_tokens: Some(0) };
    let (model, engine) = start("nano-ar", F32, limits);
    let asked = |length: u64| {
        let mut options = options(String::new(), length);
        options.prompt = Prompt::Tokens(vec![5; 10]);
        options.autoregressive.suppress_end = Some(true);
        validate(&model, options).unwrap()
    };
    assert_eq!(engine.submit(asked(200)).unwrap_err(), Refused::TooLarge { needed: 211, budget: 150 });
    // 51 tokens each: two are resident, two wait, and no more may.
    let mut taken = vec![];
    let refused = loop {
        match engine.submit(asked(40)) {
            Ok(events) => taken.push(events),
            Err(refused) => break refused,
        }
        assert!(taken.len() < 64, "nothing bounds the tokens that wait");
    };
    assert!(matches!(refused, Refused::TokensFull { .. }), "{refused:?}");
    wait("the requests do not come to an end", || {
        let load = engine.load();
        assert!(load.tokens <= 150 && load.residents <= 2, "{load:?}");
        taken.retain_mut(|events| !matches!(events.try_recv(), Ok(Ok(Event::Finished { .. }))));
        taken.is_empty()
    });
    wait("their room is not free", || engine.active() == 0);
    assert_eq!(engine.load().tokens, 0);
}

#[test]
fn priority_goes_first_where_requests_wait() {
    let (model, engine) = start("nano-ar", F32, Limits { resident: 1, ..many() });
    let asked = |priority: i32, length: u64| {
        let mut options = options("def solve(xs):\n".into(), length);
        options.autoregressive.suppress_end = Some(true);
        options.priority = priority;
        validate(&model, options).unwrap()
    };
    let first = engine.submit(asked(0, 200)).unwrap();
    let (low, high) = (engine.submit(asked(-1, 4)).unwrap(), engine.submit(asked(3, 4)).unwrap());
    let (low, high) = (collect(low).2, collect(high).2);
    assert!(high.queued < low.queued, "{:?} {:?}", high.queued, low.queued);
    collect(first);
}

#[test]
fn a_reader_that_never_looks_gets_the_newest_state_and_the_whole_text() {
    let (model, engine) = start("nano", F32, many());
    let mut asked = options("# Count the numbers in xs.\ndef solve(xs):\n".into(), 100);
    (asked.steps, asked.diffusion.finish_early) = (true, Some(false));
    (asked.diffusion.steps, asked.diffusion.block_length) = (Some(100), Some(100));
    let request = validate(&model, asked).unwrap();
    let (mut canvas, expected) = (request.canvas.clone(), collect(engine.submit(request.clone()).unwrap()));
    let mut slow = engine.submit(request).unwrap();
    wait("it waits for its reader", || engine.load().residents + engine.load().waiting == 0);
    assert_eq!(engine.active(), 1, "its reader has not taken everything");
    let (mut ids, mut steps, mut last) = (vec![], 0, None);
    while let Some(event) = slow.blocking_recv() {
        match event.unwrap() {
            Event::Step(step) => {
                step.edits.iter().for_each(|edit| canvas.replay(edit));
                steps += 1;
            }
            Event::Committed { token_ids, .. } => ids.extend(token_ids),
            Event::Finished { usage, .. } => last = Some(usage),
            Event::Started { .. } => {}
        }
    }
    assert_eq!((ids.as_slice(), last.unwrap().steps), (expected.1.as_slice(), 100));
    assert_eq!(&canvas.tokens()[..ids.len()], ids);
    assert!(steps < 40, "{steps} steps were told one by one");
    wait("its place is not free", || engine.active() == 0);
    assert!(engine.load().coalesced >= 60);
}

/// However many readers have stopped: the one that stopped first is cut off, and nobody else waits.
#[test]
fn readers_that_never_look_give_way_to_those_who_do() {
    let (model, engine) = start("nano-ar", F32, Limits { resident: 32, queued: 4, ..Limits::default() });
    let asked = || {
        let mut options = options("def solve(xs):\n".into(), 40);
        options.autoregressive.suppress_end = Some(true);
        validate(&model, options).unwrap()
    };
    let expected = collect(engine.submit(asked()).unwrap()).1;
    let mut stalled: Vec<Events> = vec![];
    while stalled.len() < 66 {
        // Never refused for those that are complete: nobody waits by then.
        stalled.push(engine.submit(asked()).unwrap());
        wait("they are not decoded", || engine.load().waiting == 0);
    }
    wait("two have to go", || engine.active() == 64);
    assert_eq!(collect(engine.submit(asked()).unwrap()).1, expected, "whoever reads is served");
    let ends: Vec<Option<Failure>> = (stalled.into_iter())
        .map(|mut events| {
            let all = std::iter::from_fn(|| events.blocking_recv());
            all.last().and_then(Result::err)
        })
        .collect();
    let cut = ends.iter().filter(|end| matches!(end, Some(Failure::Unread))).count();
    assert!((2..=3).contains(&cut), "{cut} were cut off");
    assert!(ends.iter().flatten().count() == cut, "the others have their whole text: {ends:?}");
}

fn resident_kilobytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// In a process of its own, whose memory no other test uses.
#[test]
fn thousands_of_requests_leave_nothing_behind() {
    let alone = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "thousands_of_requests", "--nocapture"])
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&alone.stdout), String::from_utf8_lossy(&alone.stderr));
    assert!(alone.status.success() && said.contains("1 passed"), "{said}");
}

/// 2,000 requests, from left to right and by diffusion, a third of which are cancelled at random moments: memory and book-keeping end where they began.
#[test]
#[ignore = "measures the process: thousands_of_requests_leave_nothing_behind runs it by itself"]
fn thousands_of_requests() {
    let limits = Limits { resident: 16, queued: 256, prefix_tokens: Some(2048), ..Limits::default() };
    let engines = ["nano-ar", "nano-block"].map(|name| {
        let (model, engine) = start(name, F32, limits);
        (engine, mixed(&model, 24))
    });
    let storm = |seed: u64, count: usize| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (mut open, mut cancelled) = (Vec::<(Events, Option<u32>)>::new(), 0);
        for _ in 0..count {
            let (engine, requests) = &engines[usize::from(rng.random_bool(0.25))];
            let request = requests[rng.random_range(0..requests.len())].clone();
            let events = loop {
                match engine.submit(request.clone()) {
                    Ok(events) => break events,
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            };
            open.push((events, rng.random_bool(1.0 / 3.0).then(|| rng.random_range(0..12))));
            open.retain_mut(|(events, patience)| {
                if *patience == Some(0) {
                    cancelled += 1;
                    return false;
                }
                *patience = patience.map(|patience| patience - 1);
                !matches!(events.try_recv(), Ok(Ok(Event::Finished { .. })))
            });
        }
        for (events, patience) in open {
            match patience {
                Some(_) => cancelled += 1,
                None => drop(collect(events)),
            }
        }
        wait("the engines are not idle", || engines.iter().all(|(engine, _)| engine.active() == 0));
        cancelled
    };
    storm(1, 300);
    let before = resident_kilobytes();
    let cancelled = storm(2, 2000);
    let after = resident_kilobytes();
    println!("{cancelled} of 2000 cancelled; {before} kB before, {after} kB after");
    assert!(cancelled > 400, "{cancelled}");
    for (engine, _) in &engines {
        let load = engine.load();
        assert_eq!((load.tokens, load.residents, load.waiting), (0, 0, 0));
        assert!(load.prefix_tokens <= 2048);
    }
    assert!(after < before + 30_000, "resident memory went from {before} to {after} kB");
}

/// Whether a request is cut off within a round, wherever it is.
#[test]
fn cancelling_frees_the_room_wherever_a_request_is() {
    let (model, engine) = start("nano-ar", F32, Limits { resident: 1, queued: 8, tokens: Some(300), ..Limits::default() });
    let asked = |chunk: u64| {
        let mut options = options(String::new(), 100);
        options.prompt = Prompt::Tokens(vec![5; 120]);
        options.autoregressive.prefill_chunk = Some(chunk);
        options.autoregressive.suppress_end = Some(true);
        validate(&model, options).unwrap()
    };
    // In its prompt, then in its text; the one behind it in the queue.
    for (chunk, events) in [(1, 1), (512, 6)] {
        let (mut running, waiting) = (engine.submit(asked(chunk)).unwrap(), engine.submit(asked(512)).unwrap());
        for _ in 0..events {
            running.blocking_recv().unwrap().unwrap();
        }
        assert!(engine.load().tokens > 0);
        drop((waiting, running));
        wait("the room of departed requests is not free", || engine.active() == 0);
        assert_eq!(engine.load().tokens, 0);
    }
    let mut late = asked(1);
    late.deadline = Some(Instant::now() + Duration::from_millis(5));
    let mut events = engine.submit(late).unwrap();
    let last = std::iter::from_fn(|| events.blocking_recv()).last();
    assert!(matches!(last, Some(Err(Failure::DeadlineExceeded))), "{last:?}");
    wait("the room of a late request is not free", || engine.active() == 0);
}
