//! Drafters against the originals: what Apple's ReDrafter and Medusa's own code computed for the same weights and inputs (see
//! tests/fixtures), and what a folder of heads must have.

mod common;

use std::path::Path;

use common::*;
use lacuna::checkpoint::config::ModelConfig;
use lacuna::decode::Drafting;
use lacuna::decode::autoregressive::DrafterKind;
use lacuna::decode::autoregressive::adaptation::Shape;
use lacuna::decode::autoregressive::tree::Tree;
use lacuna::draft::medusa::{self, Medusa};
use lacuna::draft::redrafter::{Beams, Redrafter};
use lacuna::draft::{Context, Drafter, Drafters};
use lacuna::model::family::Attention;
use lacuna::model::{Layout, Segment, Transformer};
use lacuna::tensor::{Kind, Tensor};
use serde_json::{Value, json};

/// A fixture's drafter, its reference, and the model whose embedding it shares.
fn redrafter(name: &str) -> (Redrafter, impl Fn(&str) -> Tensor, Transformer) {
    let folder = fixture("redrafter").join(name);
    let reference = tensors(&folder.join("reference.safetensors"));
    let model = if name == "trained" { load("llama", F32) } else { around(&reference("embedding")) };
    let head = Redrafter::load(&folder, model.config(), F32).unwrap();
    (head, reference, model)
}

/// Row q, column k is 1 where node q sees node k.
fn mask(tree: &Tree) -> Vec<String> {
    let sees = |mut node: usize, other: usize| {
        while node > other {
            node = tree.parents()[node];
        }
        node == other
    };
    (0..tree.len()).map(|q| (0..tree.len()).map(|k| if sees(q, k) { '1' } else { '0' }).collect()).collect()
}

#[test]
fn redrafter_states_and_logits_are_apples() {
    for name in ["trained", "projected", "additive"] {
        let (head, reference, model) = redrafter(name);
        let (context, chain) = (reference("context"), reference("chain"));
        let mut state = None;
        for step in 0..4 {
            let embedding = Redrafter::embed(&model, &chain.select(1, step)).unwrap();
            let next = head.advance(&embedding, state.as_ref()).unwrap();
            let logits = head.logits(&context, &next).unwrap();
            for (part, ours, theirs) in [("state", &next, "states"), ("logits", &logits, "logits")] {
                let error = relative_error(ours, &reference(theirs).select(1, step));
                println!("{name}, step {step}: {part} {error:.1e}");
                assert!(error <= 1e-5, "{name}, step {step}: {part} differs by {error}");
            }
            state = Some(next);
        }
    }
}

#[test]
fn beams_and_scores_are_apples() {
    let mut compared = 0;
    for name in ["trained", "projected", "additive"] {
        let (head, reference, model) = redrafter(name);
        for case in cases("redrafter/beams.json").iter().filter(|case| case["drafter"] == name) {
            let context = reference("context").narrow(0, parse(&case["context"]), 1);
            let (beams, scores): (Vec<Vec<u32>>, Vec<f64>) = (parse(&case["beams"]), parse(&case["scores"]));
            // Apple's length counts the token that is certain already.
            let shape = Shape { width: parse(&case["width"]), length: parse::<usize>(&case["length"]) - 1 };
            let found = head.search(&model, &context, parse(&case["init"]), shape).unwrap();
            let theirs: Vec<&[u32]> = beams.iter().map(|beam| &beam[1..]).collect();
            assert_eq!(found.beams, theirs, "{case}");
            for (ours, theirs) in found.scores.iter().zip(&scores) {
                assert!((f64::from(*ours) - theirs).abs() <= 2e-5, "{ours} is not {theirs}: {case}");
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 45);
}

/// The engine's drafts come from matrices in fewer bits, which round; what they propose is nearly always what the head itself would.
#[test]
fn drafts_in_fewer_bits_are_those_of_the_head() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-ar");
    let model = load_at(&folder, F32);
    let head = Redrafter::load(&folder.join("drafters/redrafter"), model.config(), F32).unwrap();
    let beams = Beams::new(head.shallow_clone());
    let tokens: Vec<u32> = (0..60).map(|at| 40 + at * at * 7 % 801).collect();
    let segment = Segment { tokens: &tokens, layout: Layout::Whole(Attention::Causal), cache: None };
    let states = tch::no_grad(|| model.forward(&[segment]).unwrap());
    let roots = model.logits(&states).unwrap().argmax(-1, false);
    let shape = Shape { width: 1, length: 3 };
    let mut same = 0;
    for at in 0..tokens.len() as i64 {
        let (hidden, root) = (states.narrow(0, at, 1), roots.int64_value(&[at]) as u32);
        let asked = Drafting { drafter: DrafterKind::Redrafter, row: 0, shape, least: 0.0, temperature: 0.0, seed: 0 };
        let draft = beams.draft(&Context { model: &model, tokens: &[root], hidden: &hidden, asked }).unwrap();
        let exact = head.search(&model, &hidden, root, shape).unwrap();
        same += usize::from(draft.tree.tokens()[1..] == exact.beams[0]);
    }
    assert!(same * 10 >= tokens.len() * 9, "{same} of {}", tokens.len());
}

/// What is left of a draft where improbable candidates are left out, against the whole one and its prefixes' probabilities.
#[test]
fn what_the_head_thinks_improbable_is_left_out() {
    if !lacuna::tensor::kernels::in_use() {
        return; // The search on tensors leaves nothing out.
    }
    let (head, reference, model) = redrafter("trained");
    let root = reference("init").int64_value(&[0]) as u32;
    let context = reference("context").narrow(0, 0, 1);
    let search = |width, length, least| head.search_sure(&model, &context, root, Shape { width, length }, least).unwrap();
    let whole = search(1, 6, 0.0);
    assert_eq!((&whole, whole.steps), (&head.search(&model, &context, root, Shape { width: 1, length: 6 }).unwrap(), 6));
    let sure: Vec<f64> = (1..=6).map(|length| f64::from(search(1, length, 0.0).scores[0]).exp()).collect();
    assert!(sure.is_sorted_by(|a, b| a > b), "{sure:?}");
    for kept in 1..6 {
        // Between the last prefix that stays and the first that does not.
        let some = search(1, 6, (sure[kept - 1] * sure[kept]).sqrt());
        assert_eq!((some.beams, some.steps), (vec![whole.beams[0][..kept].to_vec()], kept + 1), "{sure:?}");
    }
    let none = search(1, 6, sure[0] * 1.01);
    assert_eq!((none.beams, none.steps), (vec![], 1));
    // Side by side, a beam stays as far as it is sure, unless another one goes on from it.
    for least in [0.3, 0.1, 0.03, 0.01] {
        let some = search(4, 4, least);
        assert!(some.scores.iter().all(|score| f64::from(*score) >= least.ln() - 1e-6), "{least}: {some:?}");
        assert!(some.beams.len() <= 4 * 4 && some.beams.iter().all(|beam| !beam.is_empty()));
    }
    let (wide, all) = (search(4, 4, 0.01), search(4, 4, 1e-30));
    assert!(wide.beams.iter().map(Vec::len).sum::<usize>() < all.beams.iter().map(Vec::len).sum(), "{wide:?} {all:?}");
    assert_eq!(all, search(4, 4, 0.0));
}

#[test]
fn trees_are_packed_as_apple_packs_them() {
    for case in cases("redrafter/packing.json") {
        let beams: Vec<Vec<u32>> = parse(&case["beams"]);
        let tree = Tree::from_beams(beams[0][0], beams.iter().map(|beam| &beam[1..]));
        let (packed, offsets): (Vec<u32>, Vec<usize>) = (parse(&case["packed"]), parse(&case["position_offsets"]));
        let unpacker: Vec<Vec<usize>> = parse(&case["unpacker"]);
        assert_eq!((tree.tokens(), tree.depths()), (&*packed, &*offsets), "{case}");
        assert_eq!(mask(&tree), parse::<Vec<String>>(&case["mask"]), "{case}");
        assert_eq!(tree.candidates(), beams.len() * (beams[0].len() - 1));
        for (beam, places) in beams.iter().zip(&unpacker) {
            let mut node = 0;
            for (token, place) in beam[1..].iter().zip(&places[1..]) {
                node = tree.child(node, *token).unwrap();
                assert_eq!(node, *place, "{case}");
            }
        }
    }
}

/// Apple's generation loop, step by step: what is drafted, what is accepted, and what comes out.
#[test]
fn greedy_generation_is_apples_step_by_step() {
    let model = load("llama", F32);
    let mut drafters = Drafters::default();
    drafters.add(DrafterKind::Redrafter, Box::new(Beams::exact(trained(&model))));
    let mut accepted_drafts = 0;
    for case in cases("redrafter/greedy.json") {
        let (width, length): (usize, usize) = (parse(&case["width"]), parse::<usize>(&case["length"]) - 1);
        let (prompt, expected): (Vec<u32>, Vec<u32>) = (parse(&case["prompt"]), parse(&case["output"]));
        let parameters = drafted(DrafterKind::Redrafter, width, length);
        let told = drive(&model, &drafters, parameters, &prompt, parse(&case["max_new_tokens"]));
        assert_eq!(told.tokens(), expected);
        assert_eq!(told.tokens(), drive(&model, &drafters, plain(), &prompt, expected.len()).tokens());
        assert_eq!(told.steps[0].edits[0].token, parse::<u32>(&case["first"]));
        let mut written = 1;
        let theirs = case["steps"].as_array().unwrap();
        for (at, step) in theirs.iter().enumerate() {
            // Nearer the end ours drafts no more than fits, theirs cuts afterwards.
            if expected.len() - written <= length {
                assert!(at > 10, "only {at} steps were compared");
                break;
            }
            let beams: Vec<Vec<u32>> = parse(&step["beams"]);
            let tree = Tree::from_beams(beams[0][0], beams.iter().map(|beam| &beam[1..]));
            assert_eq!(told.windows[at + 1].tokens, tree.tokens(), "step {at}: drafted");
            assert_eq!(tree.len(), parse::<usize>(&step["nodes"]));
            let emitted: Vec<u32> = told.steps[at + 1].edits.iter().map(|edit| edit.token).collect();
            assert_eq!(emitted, parse::<Vec<u32>>(&step["emitted"]), "step {at}: emitted");
            assert_eq!(emitted.len() - 1, parse::<usize>(&step["accepted"]), "step {at}: accepted");
            accepted_drafts += emitted.len() - 1;
            written += emitted.len();
        }
    }
    assert!(accepted_drafts > 20, "only {accepted_drafts} drafted tokens were accepted");
}

/// Medusa's folder in the layout that is read here: the authors' settings and tensors, under the usual file name.
fn medusa_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("medusa/config.json"), folder.path().join("config.json")).unwrap();
    std::fs::copy(fixture("medusa/medusa_lm_head.safetensors"), folder.path().join("model.safetensors")).unwrap();
    folder
}

#[test]
fn medusa_logits_are_the_authors() {
    let heads = Medusa::load(medusa_folder().path(), &llama_config(64, 32, 1), F32).unwrap();
    let reference = tensors(&fixture("medusa/reference.safetensors"));
    assert_eq!(heads.heads(), 4);
    for head in 0..4 {
        let error = relative_error(&heads.logits(head, &reference("hidden")).unwrap(), &reference("logits").get(head as i64));
        assert!(error <= 1e-5, "head {head}: {error}");
    }
}

const MEDUSA: Shape = Shape { width: 10, length: 4 };

/// Their tree of 63 nodes from their logits, node for node in their order; theirs and ours from the hidden state alike.
#[test]
fn medusa_trees_are_the_authors() {
    let case = cases("medusa/trees.json").into_iter().find(|case| case["name"] == "mc_sim_7b_63").unwrap();
    let reference = tensors(&fixture("medusa/reference.safetensors"));
    let heads = Medusa::load(medusa_folder().path(), &llama_config(64, 32, 1), F32).unwrap();
    let model = around(&Tensor::randn([64, 32], (Kind::Float, lacuna::tensor::Device::Cpu)));
    for candidates in case["candidates"].as_array().unwrap() {
        let row: i64 = parse(&candidates["row"]);
        let root = reference("base_logits").get(row).argmax(-1, false).int64_value(&[]) as u32;
        let (_, best) = reference("logits").select(1, row).topk(10, -1, true, true);
        let best: Vec<Vec<u32>> = (0..4).map(|head| numbers(&best.get(head))).collect();
        let hidden = reference("hidden").narrow(0, row, 1);
        let asked = Drafting { drafter: DrafterKind::Medusa, row: 0, shape: MEDUSA, least: 0.0, temperature: 0.0, seed: 0 };
        let drafted = heads.draft(&Context { model: &model, tokens: &[root], hidden: &hidden, asked }).unwrap();
        for tree in [medusa::tree(root, &best, MEDUSA), drafted.tree] {
            assert_eq!(tree.tokens(), parse::<Vec<u32>>(&candidates["tree"]), "row {row}");
            assert_eq!(tree.depths(), parse::<Vec<usize>>(&case["position_ids"]));
            assert_eq!(mask(&tree), parse::<Vec<String>>(&case["mask"]));
        }
    }
}

fn numbers(tensor: &Tensor) -> Vec<u32> {
    Vec::<i64>::try_from(tensor).unwrap().into_iter().map(|id| id as u32).collect()
}

#[test]
fn the_walk_accepts_what_medusa_accepts() {
    let mut compared = 0;
    for case in cases("medusa/trees.json") {
        let tokens: Vec<u32> = parse(&case["candidates"][0]["tree"]);
        let depths: Vec<usize> = parse(&case["position_ids"]);
        let masks: Vec<String> = parse(&case["mask"]);
        let mut tree = Tree::root(tokens[0]);
        for node in 1..tokens.len() {
            // The deepest node that it sees besides itself.
            let sees = (0..node).filter(|other| masks[node].as_bytes()[*other] == b'1');
            tree.propose(sees.max_by_key(|other| depths[*other]).unwrap(), tokens[node], 0);
        }
        assert_eq!((tree.depths(), mask(&tree)), (&*depths, masks));
        for accept in case["accept"].as_array().unwrap() {
            let argmax: Vec<u32> = parse(&accept["argmax"]);
            let path = tree.walk(|node| argmax[node], |_| false, usize::MAX);
            assert_eq!(path, parse::<Vec<usize>>(&accept["path"]), "{accept}");
            assert_eq!(path.len() - 1, parse::<usize>(&accept["accept_length"]));
            compared += 1;
        }
    }
    assert!(compared >= 8, "only {compared} cases");
}

/// A folder with these settings and tensors.
fn folder(config: &Value, weights: &[(String, Tensor)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let named: Vec<(&str, &Tensor)> = weights.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Tensor::write_safetensors(&named, folder.path().join("model.safetensors")).unwrap();
    folder
}

fn projected() -> (Value, Vec<(String, Tensor)>) {
    let folder = fixture("redrafter/projected");
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    (config, Tensor::read_safetensors(folder.join("model.safetensors")).unwrap())
}

fn refusal(path: &Path, model: &ModelConfig) -> String {
    Redrafter::load(path, model, F32).err().expect("it is refused").to_string()
}

#[test]
fn a_head_of_another_model_is_refused_by_the_setting_that_differs() {
    let path = fixture("redrafter/projected");
    let reason = refusal(&path, &llama_config(64, 48, 1));
    assert!(reason.contains("config.json") && reason.contains("hidden_size is 32, the model's is 48"), "{reason}");
    let reason = refusal(&path, &llama_config(80, 32, 1));
    assert!(reason.contains("vocab_size is 64, the model's is 80"), "{reason}");
    // Medusa's own settings tell neither; then the tensors do.
    let medusa =
        |model: &ModelConfig| Medusa::load(medusa_folder().path(), model, F32).err().expect("it is refused").to_string();
    let reason = medusa(&llama_config(64, 48, 1));
    assert!(reason.contains("tensor 0.0.linear.weight has shape [32, 32], not [48, 48]"), "{reason}");
    let reason = medusa(&llama_config(80, 32, 1));
    assert!(reason.contains("tensor 0.1.weight has shape [64, 32], not [80, 32]"), "{reason}");
}

#[test]
fn a_broken_head_is_refused_by_what_is_wrong() {
    let model = llama_config(64, 32, 1);
    let (config, weights) = projected();
    let changed = |field: &str, value: Value| {
        let mut config = config.clone();
        config[field] = value;
        refusal(folder(&config, &weights).path(), &model)
    };
    assert!(changed("exit_dim", json!(null)).contains("exit_dim is missing"));
    assert!(changed("exit_dim", json!(-3)).contains("exit_dim is missing or not a whole number"));
    assert!(changed("num_draft_layers", json!(0)).contains("num_draft_layers"));
    let reason = changed("rnn", json!(false));
    assert!(reason.contains("tensor rnn_u.weight is unexpected"), "{reason}");
    let without: Vec<_> =
        weights.iter().filter(|(name, _)| name != "rnn_w.weight").map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    let reason = refusal(folder(&config, &without).path(), &model);
    assert!(reason.contains("tensor rnn_w.weight is missing"), "{reason}");
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path(), &model).contains("config.json"));
}

/// The head cut down to the rows of `kept`, with the offsets that lead back.
fn trimmed(kept: &[i64], offsets: &[i64]) -> tempfile::TempDir {
    let (mut config, mut weights) = projected();
    config["draft_vocab_size"] = json!(kept.len());
    for (name, tensor) in &mut weights {
        if name == "lm_head.1.weight" {
            *tensor = tensor.index_select(0, &Tensor::from_slice(kept));
        }
    }
    weights.push(("d2t".into(), Tensor::from_slice(offsets)));
    folder(&config, &weights)
}

fn offsets(kept: &[i64]) -> Vec<i64> {
    kept.iter().enumerate().map(|(row, token)| token - row as i64).collect()
}

#[test]
fn a_trimmed_vocabulary_drafts_the_tokens_that_it_stands_for() {
    let (whole, reference, model) = redrafter("projected");
    let kept: Vec<i64> = (0..64).filter(|token| token % 3 != 1).collect();
    let head = Redrafter::load(trimmed(&kept, &offsets(&kept)).path(), model.config(), F32).unwrap();
    let context = reference("context").narrow(0, 1, 1);
    let root = reference("init").int64_value(&[1]) as u32;
    let state = whole.advance(&Redrafter::embed(&model, &reference("init").narrow(0, 1, 1)).unwrap(), None).unwrap();
    let logits: Vec<f32> = Vec::try_from(whole.logits(&context, &state).unwrap().view(-1)).unwrap();
    let mut order = kept.clone();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    let found = head.search(&model, &context, root, Shape { width: 4, length: 1 }).unwrap();
    let first: Vec<i64> = found.beams.iter().map(|beam| i64::from(beam[0])).collect();
    assert_eq!(first, order[..4], "the best of the tokens that are left");
    let long = head.search(&model, &context, root, Shape { width: 4, length: 4 }).unwrap();
    assert!(long.beams.iter().flatten().all(|token| kept.contains(&i64::from(*token))), "{:?}", long.beams);
    // What is drawn from is spread over the model's vocabulary: nothing where the head has no row.
    let q = head.logits(&context, &state).unwrap().softmax(-1, Kind::Double);
    let spread: Vec<f64> = Vec::try_from(head.spread(q, 64).unwrap().view(-1)).unwrap();
    assert!((spread.iter().sum::<f64>() - 1.0).abs() < 1e-6);
    for (token, probability) in spread.iter().enumerate() {
        assert_eq!(*probability > 0.0, kept.contains(&(token as i64)), "token {token}");
    }
}

#[test]
fn a_trimmed_vocabulary_that_leads_astray_is_refused() {
    let model = llama_config(64, 32, 1);
    let kept: Vec<i64> = (0..32).map(|row| 2 * row).collect();
    let with = |row: usize, offset: i64| {
        let mut offsets = offsets(&kept);
        offsets[row] = offset;
        refusal(trimmed(&kept, &offsets).path(), &model)
    };
    assert!(with(3, -4).contains("d2t leads outside the model's vocabulary of 64"));
    assert!(with(31, 33).contains("d2t leads outside the model's vocabulary of 64"));
    // Two rows for one token would make its probability that of one of them.
    let reason = with(4, 6);
    assert!(reason.contains("d2t") && reason.contains("token 10"), "{reason}");
}

#[test]
fn all_of_this_holds_on_libtorch_alone() {
    again_without_kernels("all_of_this_holds_on_libtorch_alone");
}
