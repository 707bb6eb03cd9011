//! Products of whole numbers, held to their definition.

use super::super::launch;
use super::super::tests::{SHAPES, alike};
use super::*;
use tch::Device;

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn weight(width: Width, outputs: i64, inputs: i64, group: i64) -> (Tensor, Tensor) {
    let (low, high) = if width == Width::Eight { (-127, 128) } else { (-8, 8) };
    let codes = Tensor::randint_low(low, high, [outputs, inputs], (Kind::Int8, Device::Cpu));
    (codes, Tensor::rand([outputs, (inputs + group - 1) / group], (Kind::Float, Device::Cpu)) / 100.0)
}

/// What it should come to, in f64, with rows rounded in groups of so many numbers.
fn expected(x: &Tensor, codes: &Tensor, scales: &Tensor, group: i64, apart: i64) -> Tensor {
    let (rows, inputs) = x.size2().unwrap();
    let x = x.to_kind(Kind::Float).constant_pad_nd([0, (apart - inputs % apart) % apart]).view([rows, -1, apart]);
    let scale = x.abs().amax(-1, true) / 127.0;
    let divisor = scale.where_self(&scale.gt(0.0), &scale.ones_like());
    let rounded = (&x / divisor).round().to_kind(Kind::Double) * scale.to_kind(Kind::Double);
    let rounded = rounded.reshape([rows, -1]).narrow(1, 0, inputs);
    let scales = scales.to_kind(Kind::Double).repeat_interleave_self_int(group, 1, None::<i64>).narrow(1, 0, inputs);
    rounded.matmul(&(codes.to_kind(Kind::Double) * scales).transpose(0, 1))
}

#[test]
fn products_are_those_of_the_rounded_numbers() {
    for (width, kind) in [(Width::Eight, Kind::Float), (Width::Eight, Kind::BFloat16), (Width::Four, Kind::Float)] {
        for ((rows, inputs, outputs, group), apart) in SHAPES.into_iter().flat_map(|shape| [(shape, false), (shape, true)]) {
            let ((codes, scales), x) = (weight(width, outputs, inputs, group), random(&[rows, inputs], kind));
            // Groups of a row's numbers are those of the weights, unless an output has one scale.
            let apart = apart.then_some(if group == inputs { 32 } else { group });
            let weight = Integers::of(width, &codes, &scales, group as usize, apart.map(|apart| apart as usize));
            let ours = weight.unwrap().unwrap().product(&x).unwrap().unwrap();
            assert_eq!(ours.kind(), kind);
            let exact = expected(&x, &codes, &scales, group, apart.unwrap_or(inputs));
            let error = f64::try_from((ours.to_kind(Kind::Double) - &exact).abs().max() / exact.abs().max()).unwrap();
            let tolerance = if kind == Kind::Float { 1e-6 } else { 5e-3 };
            assert!(error < tolerance, "{width:?} {kind:?} {rows} x {inputs} x {outputs}: {error}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_those_beside_it() {
    for (width, inputs, outputs, group) in
        [(Width::Eight, 200, 301, 200), (Width::Eight, 1536, 48, 64), (Width::Four, 601, 130, 64), (Width::Four, 256, 300, 256)]
    {
        let ((codes, scales), x) = (weight(width, outputs, inputs, group), random(&[300, inputs], Kind::Float));
        let mut weight = Integers::of(width, &codes, &scales, group as usize, None).unwrap().unwrap();
        // Asking ahead, beyond the last line too, must not matter.
        weight.read_from_memory();
        alike(
            &|first, rows| weight.product(&x.narrow(0, first, rows)).unwrap().unwrap(),
            &format!("{width:?}, {inputs} inputs"),
        );
    }
}

/// On all that this CPU has instructions for, with strips of six, four, three, two and one panel, for one row and several.
#[test]
fn every_kind_of_sum_gives_the_same() {
    crate::tensor::set_threads(1);
    let input = Tensor::randint_low(-127, 128, [5 * 320], (Kind::Int8, Device::Cpu));
    let (scales, sums) = ([0.5f32; 10], [3i32; 10]);
    let mut kinds = vec!["generic"];
    #[cfg(target_arch = "x86_64")]
    {
        let (middle, wide) = (std::is_x86_feature_detected!("avx2"), std::is_x86_feature_detected!("avx512bw"));
        kinds.extend(middle.then_some("avx2").into_iter().chain(wide.then_some("avx512bw")));
    }
    let mut strips_seen = vec![];
    for (panels, rows, width) in [1, 2, 3, 4, 6, 7, 8, 9]
        .into_iter()
        .flat_map(|panels| [(panels, 1), (panels, 5)])
        .flat_map(|(panels, rows)| [(panels, rows, Width::Eight), (panels, rows, Width::Four)])
    {
        let strips = Strips::of(panels);
        strips_seen.extend(strips.share(0, 1).map(|strip| strip.wide));
        let outputs = 16 * panels - 7;
        let weights = Tensor::randint(256, [(panels * 40 * 64) as i64], (Kind::Uint8, Device::Cpu));
        let weight_scales = vec![0.25f32; 32 * panels];
        let run = |kind: &str| {
            let out = Tensor::zeros([rows, outputs as i64], (Kind::Float, Device::Cpu));
            let product = Product {
                width,
                input: input.data_ptr().cast(),
                input_scales: scales.as_ptr(),
                input_sums: sums.as_ptr(),
                weight: weights.data_ptr().cast(),
                strips,
                weight_scales: weight_scales.as_ptr(),
                scaled: true,
                out: out.data_ptr(),
                half: false,
                rows: rows as usize,
                lines: 40,
                groups: 2,
                group: 20,
                outputs,
            };
            unsafe {
                match kind {
                    "generic" => product.run::<[i32; LANES]>(0, 1),
                    #[cfg(target_arch = "x86_64")]
                    "avx2" => words(&product, 0, 1),
                    #[cfg(target_arch = "x86_64")]
                    "avx512bw" => wide_words(&product, 0, 1),
                    _ => launch(&product, false),
                }
            }
            out
        };
        for kind in &kinds {
            assert!(run(kind).equal(&run("this CPU's")), "{width:?} {kind}: {panels} panels, {rows} rows");
        }
    }
    for wide in [1, 2, 3, 4, 6] {
        assert!(strips_seen.contains(&wide), "no strip of {wide}");
    }
}

#[test]
fn what_is_no_plain_case_is_left_alone_and_broken_rows_show() {
    let (codes, scales) = weight(Width::Eight, 8, 16, 16);
    let of = |codes: &Tensor, scales: &Tensor, group: usize| Integers::of(Width::Eight, codes, scales, group, None).unwrap();
    assert!(of(&codes.to_kind(Kind::Float), &scales, 16).is_none(), "another type");
    assert!(of(&codes, &scales.narrow(0, 0, 7), 16).is_none(), "scales that do not fit");
    assert!(of(&codes, &Tensor::ones([8, 4], (Kind::Float, Device::Cpu)), 4).is_none(), "groups of part of a line");
    let weight = of(&codes, &scales, 16).unwrap();
    assert!(weight.product(&random(&[1, 15], Kind::Float)).unwrap().is_none(), "sizes that do not fit");
    assert!(weight.product(&random(&[1, 16], Kind::Double)).unwrap().is_none(), "another type");
    assert_eq!(weight.product(&random(&[0, 16], Kind::Float)).unwrap().unwrap().size(), [0, 8], "no rows");
    for broken in [f32::NAN, f32::INFINITY] {
        let x = Tensor::cat(&[Tensor::from_slice(&[broken]), Tensor::zeros([31], (Kind::Float, Device::Cpu))], 0).view([2, 16]);
        let out = weight.product(&x).unwrap().unwrap();
        assert!(out.get(0).isnan().all().int64_value(&[]) == 1 && f64::try_from(out.get(1).abs().max()).unwrap() == 0.0);
    }
}

/// In a list, where what an earlier product left lies behind a row that fills no line.
#[test]
fn turns_are_products_whatever_was_there_before() {
    for width in [Width::Eight, Width::Four] {
        let make = |inputs: i64| {
            let codes = Tensor::randint_low(-8, 8, [33, inputs], (Kind::Int8, Device::Cpu));
            let scales = Tensor::rand([33, 1], (Kind::Float, Device::Cpu));
            Integers::of(width, &codes, &scales, inputs as usize, None).unwrap().unwrap()
        };
        let (before, after) = (make(640), make(601));
        let (first, second) =
            (Tensor::randn([3, 640], (Kind::Float, Device::Cpu)), Tensor::randn([3, 601], (Kind::Float, Device::Cpu)));
        let outs = [(); 2].map(|()| Tensor::zeros([3, 33], (Kind::Float, Device::Cpu)));
        let rows = |tensor: &Tensor| Rows::of(tensor).unwrap();
        let mut turns = Turns::default();
        before.turn(rows(&first), rows(&outs[0]), &mut turns).unwrap();
        after.turn(rows(&second), rows(&outs[1]), &mut turns).unwrap();
        unsafe { turns.run() };
        assert!(outs[0].equal(&before.product(&first).unwrap().unwrap()), "{width:?}");
        assert!(outs[1].equal(&after.product(&second).unwrap().unwrap()), "{width:?}");
    }
}
