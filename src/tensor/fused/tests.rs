//! The kernels that a GPU runs, compiled for the CPU, against libtorch's operations.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use super::*;

const NAMES: [&str; 5] = ["add_norm", "gated", "rounded", "turned", "statistics"];

/// The kernels on the CPU.
pub(crate) fn emulated() -> &'static Fused {
    static FUSED: LazyLock<Fused> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("liblacuna_kernels_on_cpu.so");
        let script = Path::new("scripts/build-cuda.sh");
        let built = Command::new(script).arg("kernels-on-cpu").arg(&library).output().expect("the script starts");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        // SAFETY: what the script makes of this tree's sources.
        let library = unsafe { Library::of(&library, (c"lacuna_kernels_version", VERSION)) };
        Fused::of(&library.unwrap(), Device::Cpu).unwrap()
    });
    &FUSED
}

#[test]
fn every_kernel_computes_what_libtorch_does() {
    assert_eq!(emulated().names(), NAMES);
}

/// A kernel that does nothing.
unsafe extern "C" fn idle<A>(_: Place, _: *const A) -> c_int {
    0
}

#[test]
fn what_answers_wrong_is_not_used() {
    let idle = Fused {
        device: Device::Cpu,
        stream: None,
        add_norm: Some(idle),
        gated: Some(idle),
        rounded: Some(idle),
        turned: Some(idle),
        statistics: Some(idle),
        races: vec![],
    };
    for (name, ask, _) in questions::ALL {
        assert!(!ask(&idle).unwrap(), "{name}");
    }
}

/// The runners are of one kind: what libtorch is timed at is what the kernel computes.
#[test]
fn both_sides_of_a_race_compute_the_same() {
    let sizes = races::Sizes { hidden: 64, intermediate: 96, heads: 2, vocab: 300, rows: [2, 5], calls: 1, rounds: 1 };
    for (name, make) in races::ALL {
        for rows in sizes.rows {
            let pair = tch::no_grad(|| make(emulated(), &sizes, rows)).unwrap();
            let (ours, libtorch) = ((pair.ours)().unwrap(), (pair.libtorch)().unwrap());
            assert_eq!(ours.len(), libtorch.len(), "{name}");
            for (ours, libtorch) in ours.iter().zip(&libtorch) {
                assert_eq!(ours.size(), libtorch.size(), "{name}");
                let wide = |tensor: &Tensor| tensor.to_kind(Kind::Float).to_kind(Kind::Double);
                let error = (wide(ours) - wide(libtorch)).abs().max().double_value(&[]);
                // Codes of three bits behind the first one: the last of them may differ where a scale's last bit does.
                let tolerance = if ours.kind() == Kind::Float8e4m3fn { 32.0 } else { 0.02 };
                assert!(error <= tolerance, "{name}, {rows} rows: {error}");
            }
        }
        let races = races::run(emulated(), name, make, &sizes).unwrap();
        assert!(races.iter().map(|race| race.rows).eq(sizes.rows));
        assert!(races.iter().all(|race| race.ours.is_finite() && race.libtorch.is_finite() && race.ours > 0.0), "{races:?}");
    }
}

#[test]
fn only_who_takes_less_time_pays() {
    let race = |ours, libtorch| Race { kernel: "add_norm", rows: 1, ours, libtorch };
    assert!(races::pays(&[race(1.0, 2.0), race(3.0, 4.0)]) && races::pays(&[race(1.0, 2.0), race(5.0, 4.0)]));
    assert!(!races::pays(&[race(2.0, 1.0), race(5.0, 4.0)]) && !races::pays(&[race(1.0, 1.0)]) && !races::pays(&[]));
    assert!(!races::pays(&[race(f64::NAN, 1.0)]));
}

/// On a CPU threads that take turns lose against libtorch, so that losers are seen to be left out.
#[test]
fn whoever_loses_is_not_used() {
    let sizes = races::Sizes { hidden: 512, intermediate: 512, heads: 2, vocab: 3000, rows: [8, 16], calls: 2, rounds: 2 };
    let mut fused = Fused { races: vec![], ..*emulated() };
    fused.race(&sizes);
    for kernel in NAMES {
        let races: Vec<Race> = fused.races().iter().filter(|race| race.kernel == kernel).cloned().collect();
        assert_eq!(races.len(), 2, "{kernel}");
        assert_eq!(fused.names().contains(&kernel), races::pays(&races), "{races:?}");
    }
}

#[test]
fn what_a_kernel_does_not_take_is_left_to_libtorch() {
    let fused = emulated();
    let x = |kind| Tensor::ones([2, 8], (kind, Device::Cpu));
    let weight = Tensor::ones([8], (Kind::Float, Device::Cpu));
    let none = |x: &Tensor, weight: &Tensor| fused.add_norm(x, None, weight, 1e-6).unwrap().is_none();
    assert!(!none(&x(Kind::Float), &weight));
    assert!(none(&x(Kind::Half), &weight.to_kind(Kind::Half)) && none(&x(Kind::BFloat16), &weight), "types");
    assert!(none(&x(Kind::Float).set_requires_grad(true), &weight), "gradients");
    assert!(none(&x(Kind::Float).transpose(0, 1), &weight.narrow(0, 0, 2)), "strides");
    assert!(none(&x(Kind::Float), &weight.narrow(0, 0, 7)), "sizes");
    let half = fused.add_norm(&x(Kind::Float), Some(&x(Kind::Float).narrow(0, 0, 1)), &weight, 1e-6);
    assert!(half.unwrap().is_none(), "rows");
    assert!(fused.gated(&x(Kind::Float).narrow(1, 0, 7).contiguous()).unwrap().is_none(), "an odd width");
    assert!(!fused.turns(Kind::Half, 64) && !fused.turns(Kind::Float, 512) && fused.turns(Kind::BFloat16, 128));
}

#[test]
fn rows_without_a_best_have_no_number() {
    let logits = Tensor::from_slice(&[1f32, f32::NAN, 0.0, 1.0, f32::INFINITY, 0.0, 1.0, f32::NEG_INFINITY, 2.0]).view([3, 3]);
    let asked =
        |numbers, edits| Rows { pick: Pick::Best, numbers, edits, drawn: 1.0, judged: 1.0, margin: false, entropy: false };
    let table = |asked: &Rows| Vec::<f64>::try_from(emulated().statistics(&logits, asked).unwrap().unwrap().view(-1)).unwrap();
    let found = table(&asked(None, 0));
    assert!(found[1].is_nan() && found[3].is_nan() && found[4] == 2.0 && (found[5] - 0.731_058_6).abs() < 1e-6, "{found:?}");
    let out: Vec<f64> = (0..3).flat_map(|token| [f64::from(token), f64::NEG_INFINITY, 0.0]).collect();
    let out = Tensor::from_slice(&out);
    assert!(table(&asked(Some(&out), 3)).chunks(2).all(|row| row[1].is_nan()), "nothing is admitted");
}

/// On a machine with a GPU: `cargo test --release -- --ignored cuda`, or the test binary with these arguments.
#[test]
#[ignore = "needs a GPU, and the kernels of 'make cuda'"]
fn cuda_has_every_fused_kernel() {
    let device = crate::tensor::device("cuda:0").expect("a GPU");
    assert_eq!(Fused::on(device).expect("the library").names(), NAMES);
}
