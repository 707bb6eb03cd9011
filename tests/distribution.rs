//! What is drawn with drafts is distributed as what is drawn without.
//!
//! A network with eight tokens is small enough to enumerate: the joint distribution of three drawn tokens is known exactly, and
//! many seeds through the real decoder, drafters and statistics must come as near to it as the same number of exact draws does.
//! The sampled acceptance that ReDrafter's authors published is the control: it is not lossless (their README says so), and the same
//! bound must catch it.

mod common;

use std::collections::HashMap;

use common::*;
use lacuna::decode::autoregressive::adaptation::Shape;
use lacuna::decode::autoregressive::tree::Tree;
use lacuna::decode::autoregressive::{Autoregressive, DrafterKind, Parameters};
use lacuna::decode::canvas::{Canvas, Piece};
use lacuna::decode::{Decoder, Drafting, Noise, RowStatistics, Sampling, Wanted};
use lacuna::draft::chain::Chain;
use lacuna::draft::redrafter::{Beams, Redrafter, Settings};
use lacuna::draft::{Context, Drafter};
use lacuna::model::family::Attention;
use lacuna::model::statistics::{Conditions, Proposal, statistics};
use lacuna::model::{ModelError, Source, TensorSpec, Transformer};
use lacuna::tensor::{Device, Kind, Tensor};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const VOCAB: usize = 8;
const PROMPT: [u32; 3] = [5, 2, 7];
/// The first token is not left to chance, so that the others can all come from drafts.
const FIRST: u32 = 3;
const DRAWN: usize = 3;

/// Weights so far from one another; distributions should be neither flat nor certain.
struct Wild(f64);

impl Source for Wild {
    type Error = ModelError;
    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, ModelError> {
        let options = (Kind::Float, Device::Cpu);
        Ok(if spec.shape.len() == 1 {
            Tensor::ones(&spec.shape, options)
        } else {
            Tensor::randn(&spec.shape, options) * self.0
        })
    }
}

/// A target and a drafter, and all that the target has to say: logits and hidden states behind every beginning.
struct World {
    model: Transformer,
    head: Redrafter,
    logits: HashMap<Vec<u32>, Tensor>,
    hidden: HashMap<Vec<u32>, Tensor>,
}

impl World {
    fn new() -> Self {
        // A drafter that happens to agree with the target now and then.
        let _generator = lacuna::tensor::seeded(13);
        let model = Transformer::new(&llama_config(VOCAB, 16, 2), F32, 64, &mut Wild(0.3)).unwrap();
        let settings = Settings { hidden_size: 16, exit_dim: 32, layers: 1, rows: VOCAB, trimmed: false, recurrent: true };
        let head = Redrafter::new(settings, &mut Wild(0.2)).unwrap();
        let mut world = Self { model, head, logits: HashMap::new(), hidden: HashMap::new() };
        let forced = Tensor::full([1, VOCAB as i64], f64::NEG_INFINITY, (Kind::Float, Device::Cpu));
        let _ = forced.narrow(1, i64::from(FIRST), 1).fill_(0.0);
        world.learn(&PROMPT);
        world.logits.insert(PROMPT.into(), forced);
        let mut paths = vec![[&PROMPT[..], &[FIRST]].concat()];
        for _ in 0..DRAWN {
            paths.iter().for_each(|path| world.learn(path));
            paths = paths.iter().flat_map(|path| (0..VOCAB as u32).map(|token| [path.as_slice(), &[token]].concat())).collect();
        }
        world
    }

    fn learn(&mut self, path: &[u32]) {
        tch::no_grad(|| {
            let states = self.model.hidden(&ids(path), Attention::Causal).unwrap().get(0);
            let last = states.narrow(0, path.len() as i64 - 1, 1);
            self.logits.insert(path.into(), self.model.logits(&last).unwrap());
            self.hidden.insert(path.into(), last);
        });
    }

    /// Probabilities of what follows `path`.
    fn after(&self, path: &[u32], temperature: f64) -> Vec<f64> {
        numbers(&(&self.logits[path] / temperature).softmax(-1, Kind::Double))
    }

    /// Of every three tokens behind the first, the most significant first.
    fn joint(&self, temperature: f64) -> Vec<f64> {
        let mut joint = vec![(vec![FIRST], 1.0)];
        for _ in 0..DRAWN {
            let further = |(path, p): &(Vec<u32>, f64)| -> Vec<(Vec<u32>, f64)> {
                let next = self.after(&[&PROMPT[..], path].concat(), temperature);
                next.iter().enumerate().map(|(token, q)| ([path.as_slice(), &[token as u32]].concat(), p * q)).collect()
            };
            joint = joint.iter().flat_map(further).collect();
        }
        joint.into_iter().map(|(_, p)| p).collect()
    }
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(&tensor.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

fn cell(tokens: &[u32]) -> usize {
    tokens.iter().fold(0, |cell, token| cell * VOCAB + *token as usize)
}

/// Half the sum of the differences between a histogram's shares and what they should be.
fn variation(cells: impl Iterator<Item = usize>, exact: &[f64]) -> f64 {
    let mut counts = vec![0f64; exact.len()];
    cells.for_each(|cell| counts[cell] += 1.0);
    let total: f64 = counts.iter().sum();
    counts.iter().zip(exact).map(|(count, p)| (count / total - p).abs()).sum::<f64>() / 2.0
}

fn pick(weights: &[f64], rng: &mut StdRng) -> usize {
    let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
    let position = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    position.unwrap_or(weights.iter().rposition(|weight| *weight > 0.0).unwrap())
}

/// How far so many exact draws lie from the distribution, on average over a few such sets.
fn floor(exact: &[f64], draws: usize) -> f64 {
    let mut rng = StdRng::seed_from_u64(1);
    let mut cumulated = 0.0;
    let cumulated: Vec<f64> = exact
        .iter()
        .map(|p| {
            cumulated += p;
            cumulated
        })
        .collect();
    let mut one = |_| {
        let place = rng.random::<f64>();
        cumulated.partition_point(|p| *p < place).min(exact.len() - 1)
    };
    (0..8).map(|_| variation((0..draws).map(&mut one), exact)).sum::<f64>() / 8.0
}

/// A sequence amid its decoding, with the draft that its next window verifies.
struct Running {
    decoder: Autoregressive,
    proposal: Option<Proposal>,
}

/// Three drawn tokens from each seed, by the real decoder and drafter; only the network's forwards are looked up. Rows of all
/// sequences go through one call of the statistics, those that judge drawn tokens first, as there.
fn draw(world: &World, kind: Option<DrafterKind>, temperature: f64, seeds: usize) -> (Vec<Vec<u32>>, f64) {
    let sampling = Sampling { temperature, ..Sampling::default() };
    let shape = Shape { width: if kind == Some(DrafterKind::Redrafter) { 3 } else { 1 }, length: DRAWN };
    let mut running: Vec<Running> = (0..seeds as u64)
        .map(|seed| {
            let parameters = kind.map_or(plain(), |kind| drafted(kind, shape.width, shape.length));
            let parameters = Parameters { sampling: sampling.clone(), seed, ..parameters };
            let canvas = Canvas::new(&PROMPT, &[Piece::Hole(1 + DRAWN)], 0);
            Running { decoder: Autoregressive::new(parameters, canvas, None), proposal: None }
        })
        .collect();
    // Beams depend on nothing but what stands before them.
    let mut beams: HashMap<(Vec<u32>, usize), Tree> = HashMap::new();
    let (chain, redrafter) = (Chain::exact(world.head.shallow_clone()), Beams::exact(world.head.shallow_clone()));
    let (mut accepted, mut drafts) = (0, 0);
    while running.iter().any(|one| one.decoder.finished().is_none()) {
        let rows = rows(world, &running, &sampling);
        for (one, rows) in running.iter_mut().zip(rows).filter(|(_, rows)| !rows.is_empty()) {
            one.decoder.advance(&rows);
            one.proposal = None;
            let Some(asked) = one.decoder.drafting() else { continue };
            let known = known(&one.decoder);
            let context =
                |tokens| Context { model: &world.model, tokens, hidden: &world.hidden[&known[..known.len() - 1]], asked };
            match asked.drafter {
                DrafterKind::Chain => {
                    let draft = tch::no_grad(|| chain.draft(&context(&known)).unwrap());
                    one.proposal = draft.proposal;
                    one.decoder.propose(draft.tree);
                }
                _ => {
                    let key = (known.clone(), asked.shape.length);
                    let search = || tch::no_grad(|| redrafter.draft(&context(&known)).unwrap().tree);
                    one.decoder.propose(beams.entry(key).or_insert_with(search).clone());
                }
            }
        }
    }
    let tokens = running.iter().map(|one| {
        if let Some(seen) = one.decoder.speculation() {
            accepted += seen.accepted;
            drafts += seen.drafts;
        }
        assert_eq!(one.decoder.canvas().tokens()[0], FIRST);
        one.decoder.canvas().tokens()[1..].to_vec()
    });
    (tokens.collect(), f64::from(accepted as u32) / f64::from(drafts.max(1) as u32))
}

fn known(decoder: &Autoregressive) -> Vec<u32> {
    let canvas = decoder.canvas();
    canvas.sequence()[..canvas.prompt_len() + canvas.frontier()].to_vec()
}

/// Statistics of what the windows of all unfinished sequences want, by sequence.
fn rows(world: &World, running: &[Running], sampling: &Sampling) -> Vec<Vec<RowStatistics>> {
    let mut places: Vec<(bool, usize, usize)> = vec![];
    let (mut logits, mut uniforms, mut judged) = (HashMap::new(), HashMap::new(), HashMap::new());
    for (index, one) in running.iter().enumerate().filter(|(_, one)| one.decoder.finished().is_none()) {
        let window = one.decoder.window();
        let (Wanted::Following(wanted), Noise::Uniforms(numbers)) = (&window.wanted, &window.noise) else {
            panic!("a window of another method")
        };
        let known = known(&one.decoder);
        let drawn = one.proposal.as_ref().map_or(0, |proposal| proposal.tokens.len());
        // A chain's tokens stand one behind the other, and beams' trees come from the beams.
        let tree = tree_of(&window.tokens, &window.pattern);
        for (row, node) in wanted.iter().enumerate() {
            let path = if known.len() == PROMPT.len() { known.clone() } else { [known.as_slice(), &tree.path(*node)].concat() };
            places.push((row >= drawn, index, row));
            logits.insert((index, row), &world.logits[&path]);
            uniforms.insert((index, row), numbers[row]);
            if row < drawn {
                judged.insert((index, row), one.proposal.as_ref().unwrap());
            }
        }
    }
    places.sort();
    let all: Vec<&Tensor> = places.iter().map(|(_, index, row)| logits[&(*index, *row)]).collect();
    let noise = Noise::Uniforms(places.iter().map(|(_, index, row)| uniforms[&(*index, *row)]).collect());
    let drawn: Vec<(usize, &Proposal)> =
        places.iter().filter(|(free, ..)| !free).map(|(_, index, row)| (*row, judged[&(*index, *row)])).collect();
    let proposal = (!drawn.is_empty()).then(|| Proposal {
        tokens: drawn.iter().map(|(row, one)| one.tokens[*row]).collect(),
        uniforms: drawn.iter().map(|(row, one)| one.uniforms[*row]).collect(),
        probabilities: Tensor::cat(
            &drawn.iter().map(|(row, one)| one.probabilities.narrow(0, *row as i64, 1)).collect::<Vec<_>>(),
            0,
        ),
    });
    let conditions = Conditions { sampling, noise: &noise, histories: &[], proposal: proposal.as_ref() };
    let found = statistics(&Tensor::cat(&all, 0), &conditions).unwrap();
    let mut rows = vec![vec![]; running.len()];
    let mut ordered: Vec<_> = places.into_iter().zip(found).collect();
    ordered.sort_by_key(|((_, index, row), _)| (*index, *row));
    ordered.into_iter().for_each(|((_, index, _), row)| rows[index].push(row));
    rows
}

fn tree_of(tokens: &[u32], pattern: &lacuna::decode::Pattern) -> Tree {
    let mut tree = Tree::root(tokens[0]);
    for (node, token) in tokens.iter().enumerate().skip(1) {
        let parent = if let lacuna::decode::Pattern::Tree(parents) = pattern { parents[node] } else { node - 1 };
        tree.propose(parent, *token, 0);
    }
    tree
}

const TEMPERATURES: [f64; 3] = [0.7, 1.0, 1.5];

/// Checks all three temperatures; `most` is how many times the noise of exact draws a distribution may be off.
fn assert_lossless(kind: Option<DrafterKind>, seeds: usize) {
    let world = World::new();
    for temperature in TEMPERATURES {
        let exact = world.joint(temperature);
        assert!((exact.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        let (drawn, accepted) = draw(&world, kind, temperature, seeds);
        let (off, noise) = (variation(drawn.iter().map(|tokens| cell(tokens)), &exact), floor(&exact, seeds));
        let name = kind.map_or("plain", DrafterKind::name);
        println!(
            "{name}, temperature {temperature}: off by {off:.4}, exact draws by {noise:.4}; {accepted:.2} accepted a draft"
        );
        assert!(off <= BOUND * noise, "{name}, temperature {temperature}: off by {off}, exact draws by {noise}");
        assert!(kind.is_none() || accepted > 0.3, "{accepted} accepted tokens a draft test little");
    }
}

const BOUND: f64 = 1.5;

#[test]
fn plain_draws_follow_the_distribution() {
    assert_lossless(None, 40_000);
}

#[test]
fn draws_through_beams_follow_the_distribution() {
    assert_lossless(Some(DrafterKind::Redrafter), 40_000);
}

#[test]
fn draws_through_drawn_chains_follow_the_distribution() {
    assert_lossless(Some(DrafterKind::Chain), 30_000);
}

/// The published rule for one draft, by tests/fixtures/redrafter/README.md: probabilities `p` `[w][L][V]` and `q` `[w][L - 1][V]`,
/// coins `[w][L - 1]`. Gives the beam, how much of it is accepted, and the weights of the token after that.
fn published(beams: &[Vec<u32>], p: &[Vec<Vec<f64>>], q: &[Vec<Vec<f64>>], coins: &[Vec<f64>]) -> (usize, usize, Vec<f64>) {
    let accepted = |beam: usize| {
        let right = |k: &usize| {
            let token = beams[beam][k + 1] as usize;
            coins[beam][*k] < p[beam][*k][token] / q[beam][*k][token]
        };
        (0..coins[beam].len()).take_while(right).count()
    };
    let counts: Vec<usize> = (0..beams.len()).map(accepted).collect();
    let most = *counts.iter().max().unwrap();
    let beam = counts.iter().position(|count| *count == most).unwrap();
    let weights = match q[beam].get(most) {
        Some(q) => p[beam][most].iter().zip(q).map(|(p, q)| (p - q).max(0.0)).collect(),
        None => p[beam][most].clone(),
    };
    (beam, most, weights)
}

fn nested(tensor: &Tensor) -> Vec<Vec<Vec<f64>>> {
    let (a, b, _) = tensor.size3().unwrap();
    (0..a).map(|i| (0..b).map(|j| numbers(&tensor.get(i).get(j))).collect()).collect()
}

/// That what is called the published rule below is the published rule.
#[test]
fn the_published_rule_is_the_authors() {
    let reference = tensors(&fixture("redrafter/sampled.safetensors"));
    let (p, q) = (nested(&reference("log_p").exp()), nested(&reference("log_q").exp()));
    let beams: Vec<Vec<u32>> =
        (0..3).map(|i| numbers(&reference("beams").get(i)).iter().map(|id| *id as u32).collect()).collect();
    // Step 1: the 50 best logits at every node, at the temperature.
    let logits = reference("logits");
    let (least, _) = logits.topk(50, -1, true, true);
    let warped = logits.masked_fill(&logits.lt_tensor(&least.narrow(1, 49, 1)), -50_000.0);
    let ours = (warped / reference("temperature")).softmax(-1, Kind::Double);
    let places = reference("unpacker");
    for beam in 0..3 {
        let error = relative_error(&ours.index_select(0, &places.get(beam)), &reference("log_p").get(beam).exp());
        assert!(error < 1e-5, "beam {beam}: {error}");
    }
    for (draw, coins) in nested(&reference("uniforms")).iter().enumerate() {
        let (beam, accepted, weights) = published(&beams, &p, &q, coins);
        let theirs = |name: &str| reference(name).int64_value(&[draw as i64]) as usize;
        assert_eq!((beam, accepted), (theirs("beam"), theirs("accepted")), "draw {draw}");
        let original = numbers(&reference("next_weights").get(draw as i64));
        let worst = weights.iter().zip(&original).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-6, "draw {draw}: weights differ by {worst}");
    }
}

/// The control: the same target, drafter, number of draws and bound; only the rule is the published one.
#[test]
fn the_published_rule_does_not_follow_the_distribution() {
    const DRAWS: usize = 40_000;
    let world = World::new();
    for temperature in TEMPERATURES {
        let mut rng = StdRng::seed_from_u64(7);
        let mut drafts = HashMap::new();
        let one = |_| {
            let mut text = [&PROMPT[..], &[FIRST]].concat();
            while text.len() < PROMPT.len() + 1 + DRAWN {
                let (beams, p, q): &Draft = drafts.entry(text.clone()).or_insert_with(|| draft(&world, &text, temperature));
                let coins: Vec<Vec<f64>> = q.iter().map(|q| q.iter().map(|_| rng.random()).collect()).collect();
                let (beam, accepted, weights) = published(beams, p, q, &coins);
                text.extend(&beams[beam][1..=accepted]);
                text.push(pick(&weights, &mut rng) as u32);
            }
            cell(&text[PROMPT.len() + 1..][..DRAWN])
        };
        let drawn: Vec<usize> = (0..DRAWS).map(one).collect();
        let exact = world.joint(temperature);
        let (off, noise) = (variation(drawn.into_iter(), &exact), floor(&exact, DRAWS));
        println!("published, temperature {temperature}: off by {off:.4}, exact draws by {noise:.4}");
        assert!(off > BOUND * noise, "temperature {temperature}: the bound does not catch a rule that is not lossless");
    }
}

/// Beams, and the target's and the drafter's probabilities, `[w][L][V]` and `[w][L - 1][V]`.
type Draft = (Vec<Vec<u32>>, Vec<Vec<Vec<f64>>>, Vec<Vec<Vec<f64>>>);

/// Three beams behind `text`, as long as fits, with both models' probabilities along them.
fn draft(world: &World, text: &[u32], temperature: f64) -> Draft {
    tch::no_grad(|| {
        let length = (PROMPT.len() + DRAWN - text.len()).min(2);
        let hidden = &world.hidden[&text[..text.len() - 1]];
        let root = text[text.len() - 1];
        let found = world.head.search(&world.model, hidden, root, Shape { width: 3, length }).unwrap();
        let beams: Vec<Vec<u32>> = if length == 0 {
            vec![vec![root]]
        } else {
            found.beams.iter().map(|beam| [&[root], beam.as_slice()].concat()).collect()
        };
        let (mut p, mut q) = (vec![], vec![]);
        for beam in &beams {
            p.push((0..beam.len()).map(|k| world.after(&[text, &beam[1..=k]].concat(), temperature)).collect());
            let mut state: Option<Tensor> = None;
            let mut along = vec![];
            for token in &beam[..beam.len() - 1] {
                let embedding = Redrafter::embed(&world.model, &Tensor::from_slice(&[i64::from(*token)])).unwrap();
                let next = world.head.advance(&embedding, state.as_ref()).unwrap();
                along.push(numbers(&world.head.logits(hidden, &next).unwrap().softmax(-1, Kind::Double)));
                state = Some(next);
            }
            q.push(along);
        }
        (beams, p, q)
    })
}

/// A drawn chain is what it says, by the kernels and by tensors alone: its tokens are distributed as its probabilities.
#[test]
fn chains_are_drawn_from_what_they_say() {
    let world = World::new();
    for chain in [Chain::exact(world.head.shallow_clone()), Chain::new(world.head.shallow_clone(), None)] {
        drawn_from_what_it_says(&world, &chain);
    }
}

fn drawn_from_what_it_says(world: &World, chain: &Chain) {
    let tokens = [&PROMPT[..], &[FIRST]].concat();
    let hidden = &world.hidden[&PROMPT[..]];
    let shape = Shape { width: 1, length: 2 };
    let (mut cells, mut exact) = (vec![], vec![0.0; VOCAB * VOCAB]);
    for seed in 0..8_000u64 {
        let asked = Drafting {
            drafter: DrafterKind::Chain,
            row: 0,
            shape,
            least: 0.0,
            temperature: 1.0,
            seed: seed.wrapping_mul(0x9e37_79b9),
        };
        let context = Context { model: &world.model, tokens: &tokens, hidden, asked };
        let proposal = tch::no_grad(|| chain.draft(&context).unwrap()).proposal.unwrap();
        cells.push(cell(&proposal.tokens));
        let (first, second) = (numbers(&proposal.probabilities.get(0)), numbers(&proposal.probabilities.get(1)));
        assert!((first.iter().sum::<f64>() - 1.0).abs() < 1e-6);
        let head = proposal.tokens[0] as usize;
        (0..VOCAB).for_each(|next| exact[head * VOCAB + next] = first[head] * second[next]);
    }
    let (off, noise) = (variation(cells.into_iter(), &exact), floor(&exact, 8_000));
    assert!((exact.iter().sum::<f64>() - 1.0).abs() < 1e-3, "every first token was drawn");
    assert!(off <= BOUND * noise, "off by {off}, exact draws by {noise}");
}
