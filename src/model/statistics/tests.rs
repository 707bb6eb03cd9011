//! Whoever tells statistics tells the same: kernels for rows, one pass, and libtorch, which is held to definitions.

use super::*;
use crate::decode::Penalties;
use crate::tensor::Kind;

fn logits(rows: &[&[f32]]) -> Tensor {
    let flat: Vec<f32> = rows.concat();
    Tensor::from_slice(&flat).view([rows.len() as i64, -1])
}

/// By our own kernels, once it is seen that libtorch tells the same.
fn both(logits: &Tensor, conditions: &Conditions) -> Result<Vec<RowStatistics>, ModelError> {
    let rows = logits.size()[0] as usize;
    let ours = super::statistics(logits, conditions);
    let mut ledger = Ledger::default();
    ledger.add_table(logits, &[Part { index: 0, at: 0, rows, conditions: *conditions }])?;
    let theirs = ledger.read()?.pop().unwrap().1;
    let (Ok(ours), Ok(theirs)) = (&ours, &theirs) else {
        assert_eq!(ours.is_err(), theirs.is_err());
        return ours;
    };
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        // Any of those that are out may stand behind those that are in.
        let inside = |row: &RowStatistics| {
            row.alternatives.iter().filter(|(_, p)| p.is_finite()).map(|(token, _)| *token).collect::<Vec<_>>()
        };
        let asked = (conditions.sampling, conditions.noise);
        assert_eq!((ours.token, inside(ours)), (theirs.token, inside(theirs)), "{asked:?}");
        let numbers = |row: &RowStatistics| {
            let logarithms = row.alternatives.iter().map(|(_, logarithm)| *logarithm);
            [row.confidence, row.margin, row.entropy].into_iter().chain(logarithms).collect::<Vec<_>>()
        };
        let alike = |(a, b): (f64, f64)| a == b || (a - b).abs() <= 2e-6 * (1.0 + a.abs());
        assert!(numbers(ours).into_iter().zip(numbers(theirs)).all(alike), "{ours:?}, {theirs:?}: {asked:?}");
    }
    Ok(ours.clone())
}

fn seeded(logits: &Tensor, sampling: &Sampling, seed: u64) -> Result<Vec<RowStatistics>, ModelError> {
    both(logits, &Conditions { sampling, noise: &Noise::Seed(seed), histories: &[], proposal: None })
}

/// Everything that can be asked, alone and together, of vocabularies with a remainder and without.
#[test]
fn rows_are_told_as_libtorch_tells_them() {
    let _generator = crate::tensor::seeded(3);
    for (vocab, spread) in [(1000, 3.0), (4099, 1.0), (4096, 8.0)] {
        let logits = Tensor::randn([6, vocab], (Kind::Float, Device::Cpu)) * spread;
        let plain = Sampling { margin: true, entropy: true, alternatives: 4, ..Sampling::default() };
        let penalties = Penalties { repetition: 1.3, presence: 0.4, frequency: 0.3 };
        let ids = (0..20).collect::<Vec<u32>>();
        let histories: Vec<Vec<History>> =
            (0..6u32).map(|row| (0..30).map(|at| (row + 31 * at, at % 3, at % 4)).collect()).collect();
        for temperature in [0.0, 0.3, 1.0, 1.7] {
            for filtered_confidence in [false, true] {
                let base = Sampling { temperature, filtered_confidence, ..plain.clone() };
                let cases = [
                    base.clone(),
                    Sampling { top_k: Some(7), ..base.clone() },
                    Sampling { top_p: Some(0.8), ..base.clone() },
                    Sampling { top_p: Some(0.01), ..base.clone() },
                    Sampling { min_p: Some(0.05), ..base.clone() },
                    Sampling { top_k: Some(40), top_p: Some(0.9), min_p: Some(0.01), ..base.clone() },
                    Sampling { top_k: Some(900), top_p: Some(0.3), ..base.clone() },
                    Sampling { logit_bias: vec![(3, 9.0), (5, -2.0)], forbidden: ids.clone(), ..base.clone() },
                    Sampling { unconfident: ids.clone(), ..base.clone() },
                    Sampling { penalties, ..base.clone() },
                    Sampling { penalties, top_p: Some(0.7), unconfident: ids.clone(), ..base },
                ];
                for sampling in &cases {
                    let given = (0..6).map(|row| row * 100).collect();
                    for noise in [Noise::Seed(5), Noise::Uniforms(vec![0.0, 0.2, 0.4, 0.6, 0.8, 0.999]), Noise::Given(given)] {
                        both(&logits, &Conditions { sampling, noise: &noise, histories: &histories, proposal: None }).unwrap();
                    }
                }
            }
        }
    }
}

/// The kernel of a GPU, on the CPU: a table for whatever it takes, and libtorch's for the rest.
#[test]
fn one_pass_tells_what_libtorch_tells() {
    let _generator = crate::tensor::seeded(4);
    let fused = crate::tensor::fused::tests::emulated();
    let base = Sampling { margin: true, entropy: true, ..Sampling::default() };
    let histories = vec![vec![(3, 1, 1)]; 4];
    let apart = Sampling {
        logit_bias: vec![(700, 4.0), (3, -2.0), (700, 1.0)],
        forbidden: vec![5, 9],
        unconfident: vec![7, 700],
        ..base.clone()
    };
    let cases = [
        (true, base.clone()),
        (true, Sampling { margin: false, ..apart.clone() }),
        (true, Sampling { temperature: 0.6, ..apart.clone() }),
        (true, Sampling { temperature: 1.8, filtered_confidence: true, ..apart }),
        (false, Sampling { top_k: Some(3), ..base.clone() }),
        (false, Sampling { top_p: Some(0.5), temperature: 1.0, ..base.clone() }),
        (false, Sampling { min_p: Some(0.1), ..base.clone() }),
        (false, Sampling { alternatives: 2, ..base.clone() }),
        (false, Sampling { penalties: Penalties { presence: 1.0, ..Penalties::default() }, ..base }),
    ];
    for (kind, vocab) in [(Kind::Float, 1000), (Kind::BFloat16, 1003)] {
        let logits = (Tensor::randn([4, vocab], (Kind::Float, Device::Cpu)) * 3.0).to_kind(kind);
        for (taken, sampling) in &cases {
            for noise in [Noise::Uniforms(vec![0.0, 0.4, 0.7, 1.0]), Noise::Given(vec![0, 7, 5, 999])] {
                let conditions = Conditions { sampling, noise: &noise, histories: &histories, proposal: None };
                let asked = Rows {
                    sampling,
                    picks: conditions.picks(4).unwrap(),
                    histories: conditions.histories(4).iter().map(Vec::as_slice).collect(),
                    proposal: None,
                };
                let Some(found) = one_pass::table(fused, &logits, &asked).unwrap() else {
                    assert!(!taken, "{sampling:?} was not taken");
                    continue;
                };
                assert!(taken, "{sampling:?} was taken");
                let right = table::table(&logits, &asked).unwrap();
                assert!(found.allclose(&right, 2e-5, 1e-7, false), "{kind:?} {sampling:?} {noise:?}: {found} {right}");
            }
        }
    }
    // A ledger has whoever is there make its tables.
    let logits = Tensor::randn([2, 64], (Kind::Float, Device::Cpu));
    let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
    let conditions = Conditions { sampling: &sampling, noise: &Noise::Seed(3), histories: &[], proposal: None };
    let part = Part { index: 0, at: 0, rows: 2, conditions };
    let told = |fused| {
        let mut ledger = Ledger::new(fused);
        ledger.add_table(&logits, &[part]).unwrap();
        ledger.read().unwrap().pop().unwrap().1.unwrap()
    };
    let (ours, theirs) = (told(Some(fused)), told(None));
    assert!(ours.iter().zip(&theirs).all(|(a, b)| a.token == b.token && close(a.confidence, b.confidence)));
}

/// bf16 has many logits that are the same: as many as are needed are in, those with the lowest ids first.
#[test]
fn of_equal_logits_as_many_are_in_as_the_share_needs() {
    let mut row = vec![0f32; 50];
    row[10..20].fill(3.0);
    let p = 3f64.exp() / (10.0 * 3f64.exp() + 40.0);
    let sampling = Sampling { temperature: 1.0, top_p: Some(3.5 * p), filtered_confidence: true, ..Sampling::default() };
    let noise = Noise::Uniforms(vec![0.0, 0.3, 0.6, 0.99]);
    let conditions = Conditions { sampling: &sampling, noise: &noise, histories: &[], proposal: None };
    let found = super::statistics(&logits(&[&row, &row, &row, &row]).to_kind(Kind::BFloat16), &conditions).unwrap();
    assert_eq!(found.iter().map(|row| row.token).collect::<Vec<_>>(), [10, 11, 12, 13]);
    assert!(found.iter().all(|row| close(row.confidence, 0.25)), "{found:?}");
}

/// Windows with every kind of conditions, asked together and each by itself.
#[test]
fn windows_together_are_told_what_each_is_told_alone() {
    let _generator = crate::tensor::seeded(9);
    let logits = Tensor::randn([12, 3000], (Kind::Float, Device::Cpu)) * 3.0;
    let greedy = Sampling { forbidden: vec![1], ..Sampling::default() };
    let warm = Sampling { temperature: 0.8, top_p: Some(0.9), entropy: true, ..Sampling::default() };
    let broken = Sampling { forbidden: (0..3000).collect(), ..Sampling::default() };
    let probabilities = Tensor::ones([1, 3000], (Kind::Float, Device::Cpu)) / 3000;
    let proposal = Proposal { tokens: vec![7], probabilities, uniforms: vec![0.5] };
    let uniforms = Noise::Uniforms(vec![0.3, 0.9]);
    let kinds = [
        (&greedy, Noise::Seed(1), None),
        (&greedy, Noise::Seed(2), None),
        (&warm, Noise::Seed(3), None),
        (&warm, Noise::Seed(4), None),
        (&warm, uniforms, Some(&proposal)),
        (&broken, Noise::Seed(5), None),
    ];
    let part = |index: usize| {
        let (sampling, noise, proposal) = &kinds[index];
        Part { index, at: 2 * index, rows: 2, conditions: Conditions { sampling, noise, histories: &[], proposal: *proposal } }
    };
    let parts: Vec<Part> = (0..kinds.len()).map(part).collect();
    let mut by_libtorch = Ledger::default();
    for alike in parts.chunk_by(|a, b| a.conditions.alike(&b.conditions)) {
        by_libtorch.add_table(&logits, alike).unwrap();
    }
    assert_eq!(by_libtorch.tables.len(), 4, "the greedy ones share a table, and those with a temperature");
    let mut ours = Ledger::default();
    ours.add(&logits, &parts).unwrap();
    assert_eq!(ours.read().unwrap().len(), kinds.len());
    for (index, rows) in by_libtorch.read().unwrap() {
        let alone = both(&logits.narrow(0, 2 * index as i64, 2), &parts[index].conditions);
        let (Ok(rows), Ok(alone)) = (&rows, &alone) else {
            assert!(index == 5 && rows.is_err() && alone.is_err());
            continue;
        };
        assert!(rows.iter().zip(alone).all(|(a, b)| a.token == b.token && close(a.confidence, b.confidence)), "{index}");
    }
}

fn one(row: &[f32], sampling: &Sampling) -> RowStatistics {
    seeded(&logits(&[row]), sampling, 1).unwrap()[0].clone()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-6
}

#[test]
fn greedy_statistics_are_those_of_the_softmax() {
    let all = Sampling { margin: true, entropy: true, ..Sampling::default() };
    let row = one(&[1.0, 3.0, 2.0], &all);
    let weights = [1.0f64, 3.0, 2.0].map(f64::exp);
    let p = weights.map(|w| w / weights.iter().sum::<f64>());
    let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
    assert_eq!(row.token, 1);
    assert!(close(row.confidence, p[1]) && close(row.margin, p[1] - p[2]) && close(row.entropy, entropy), "{row:?}");
}

#[test]
fn near_certain_confidences_keep_their_order() {
    // 1 − 10⁻⁸ and 1 − 10⁻⁹: equal in f32.
    let rows = seeded(&logits(&[&[18.4, 0.0], &[20.7, 0.0]]), &Sampling::default(), 0).unwrap();
    assert!(rows[0].confidence < rows[1].confidence, "{rows:?}");
}

#[test]
fn forbidden_tokens_have_neither_choice_nor_probability() {
    let row = one(&[5.0, 1.0, 1.0], &Sampling { forbidden: vec![0], entropy: true, ..Sampling::default() });
    assert!(row.token == 1 && close(row.confidence, 0.5) && close(row.entropy, 2f64.ln()), "{row:?}");
    let late = one(&[5.0, 1.0, 1.0], &Sampling { unconfident: vec![0], ..Sampling::default() });
    assert_eq!((late.token, late.confidence), (0, 0.0));
}

#[test]
fn the_logits_given_are_not_written_to() {
    let given = logits(&[&[5.0, 1.0, 1.0]]);
    let sampling = Sampling { forbidden: vec![0], logit_bias: vec![(2, 3.0)], ..Sampling::default() };
    assert_eq!(seeded(&given, &sampling, 0).unwrap()[0].token, 2);
    assert_eq!(Vec::<f32>::try_from(given.view(-1)).unwrap(), [5.0, 1.0, 1.0]);
}

/// 80,000 draws, from four seeds, against softmax(logits / T) after each filter; the bound is four standard errors.
#[test]
fn sampling_follows_the_filtered_distribution() {
    let row = [2.0f32, 1.0, 0.5, -1.0];
    let draws = 20_000;
    let cases = [
        (Sampling { temperature: 1.0, ..Sampling::default() }, vec![0, 1, 2, 3]),
        (Sampling { temperature: 0.5, ..Sampling::default() }, vec![0, 1, 2, 3]),
        (Sampling { temperature: 1.0, top_k: Some(2), ..Sampling::default() }, vec![0, 1]),
        // Probabilities 0.60, 0.22, 0.13, 0.03: two tokens reach 0.7.
        (Sampling { temperature: 1.0, top_p: Some(0.7), ..Sampling::default() }, vec![0, 1]),
        (Sampling { temperature: 1.0, min_p: Some(0.2), ..Sampling::default() }, vec![0, 1, 2]),
    ];
    for (sampling, admitted) in cases {
        let many = Tensor::from_slice(&row).unsqueeze(0).expand([draws, 4], false).contiguous();
        let mut counts = [0f64; 4];
        for seed in 0..4 {
            for row in seeded(&many, &sampling, seed).unwrap() {
                counts[row.token as usize] += 1.0;
            }
        }
        let drawn: f64 = counts.iter().sum();
        let weight = |token: usize| {
            if admitted.contains(&token) { f64::from(row[token] / sampling.temperature as f32).exp() } else { 0.0 }
        };
        let total: f64 = (0..4).map(weight).sum();
        for (token, count) in counts.iter().enumerate() {
            let p = weight(token) / total;
            let error = 4.0 * (p * (1.0 - p) / drawn).sqrt();
            assert!((count / drawn - p).abs() <= error, "{sampling:?} token {token}: {} for {p}", count / drawn);
        }
    }
}

fn drawn(row: &[f32], uniforms: &[f64], proposal: Option<&Proposal>) -> Vec<u32> {
    let many = logits(&vec![row; uniforms.len()]);
    let (sampling, noise) = (Sampling { temperature: 1.0, ..Sampling::default() }, Noise::Uniforms(uniforms.to_vec()));
    let conditions = Conditions { sampling: &sampling, noise: &noise, histories: &[], proposal };
    both(&many, &conditions).unwrap().iter().map(|row| row.token).collect()
}

/// Probabilities 1/10, 2/10, 3/10, 4/10, and none.
const TENTHS: [f32; 5] = [0.0, std::f32::consts::LN_2, 1.098_612_3, 2.0 * std::f32::consts::LN_2, f32::NEG_INFINITY];

#[test]
fn a_number_picks_from_the_cumulated_distribution() {
    let numbers = [0.0, 0.099, 0.101, 0.299, 0.301, 0.599, 0.601, 0.999, 1.0];
    assert_eq!(drawn(&TENTHS, &numbers, None), [0, 0, 1, 1, 2, 2, 3, 3, 3]);
    let swapped = [TENTHS[4], TENTHS[3], TENTHS[0], TENTHS[4]];
    assert_eq!(drawn(&swapped, &[0.0, 0.79, 0.81, 1.0], None), [1, 1, 2, 2], "what is impossible is not picked");
}

#[test]
fn a_draw_is_accepted_by_the_ratio_and_replaced_from_the_residual() {
    // q = 4/10, 3/10, 2/10, 1/10: p − q is left on the tokens 2 and 3, in parts of 1 and 3.
    let q = Tensor::from_slice(&[0.4f32, 0.3, 0.2, 0.1, 0.0]).unsqueeze(0).expand([5, 5], false);
    // Token 0 is accepted with 1/4, token 1 with 2/3, token 3 always.
    let proposal = Proposal { tokens: vec![0, 0, 1, 1, 3], probabilities: q, uniforms: vec![0.24, 0.26, 0.66, 0.67, 0.999] };
    // The sixth row judges nothing.
    assert_eq!(drawn(&TENTHS, &[0.9, 0.24, 0.9, 0.26, 0.0, 0.05], Some(&proposal)), [0, 2, 1, 3, 3, 0]);
}

#[test]
fn noise_is_a_function_of_its_seed() {
    let logits = Tensor::zeros([8, 50], (Kind::Float, Device::Cpu));
    let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
    let tokens = |seed| seeded(&logits, &sampling, seed).unwrap().iter().map(|row| row.token).collect::<Vec<_>>();
    assert_eq!(tokens(1), tokens(1));
    assert_ne!(tokens(1), tokens(2));
}

#[test]
fn logits_that_are_not_finite_are_an_error() {
    assert!(matches!(seeded(&logits(&[&[f32::NAN, 1.0]]), &Sampling::default(), 0), Err(ModelError::NotFinite)));
    let all = Sampling { forbidden: vec![0, 1], ..Sampling::default() };
    assert!(matches!(seeded(&logits(&[&[1.0, 1.0]]), &all, 0), Err(ModelError::NotFinite)));
}
