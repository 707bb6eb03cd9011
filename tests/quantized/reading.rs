//! Checkpoints that other tools wrote mean here what they mean there (tests/reference/make_quantized.py), and broken ones are refused by
//! name.

use lacuna::checkpoint::config::ModelConfig;
use lacuna::checkpoint::quantization::{Quantization, projections};
use lacuna::checkpoint::weights::WeightFiles;
use lacuna::model::quantized::{Activations, Codes, Quantized, Scheme, Sharing};
use lacuna::tensor::{Kind, Tensor};
use serde_json::{Value, json};

use super::common::{fixture, relative_error, tensors};
use super::{dequantised, json_of, logits, network, open, weights_only};

const FOLDERS: [&str; 8] = ["int8", "int8-weights", "int4", "int4-rows", "fp8", "fp8-tensor", "fp8-blocks", "deepseek"];

/// With activations kept, what is left of a difference is rounding: of f32, and in `int4`, a model in bf16, of the weights to bf16.
#[test]
fn weights_of_other_tools_mean_the_same_here() {
    for name in FOLDERS {
        let folder = fixture("quantized").join(name);
        let reference = tensors(&folder.join("reference.safetensors"));
        let (config, files) = open(&folder, weights_only).unwrap();
        let model = dequantised(&config, &files);
        let error = relative_error(&logits(&model, &reference("input_ids")), &reference("logits_weights"));
        println!("{name}: {error:.1e}");
        assert!(error < if name == "int4" { 0.02 } else { 1e-5 }, "{name}: {error}");
    }
}

/// As they run, with activations quantised where the checkpoint says so. Floats of eight bits are the same; for int8 theirs make the largest
/// number 127.5 codes, ours 127, as vLLM does, so that the two are as far apart as quantising activations changes anything at all.
/// DeepSeek's blocks are not here: transformers keeps their activations on a CPU.
#[test]
fn products_of_other_tools_are_ours() {
    for name in FOLDERS.into_iter().filter(|name| *name != "deepseek") {
        let folder = fixture("quantized").join(name);
        let reference = tensors(&folder.join("reference.safetensors"));
        let (config, files) = open(&folder, |_| {}).unwrap();
        let ours = logits(&network(&config, &files).unwrap(), &reference("input_ids"));
        let error = relative_error(&ours, &reference("logits"));
        let effect = relative_error(&reference("logits"), &reference("logits_weights"));
        println!("{name}: {error:.1e}, activations {effect:.1e}");
        let tolerance = match name {
            "int8" | "int4-rows" => 1.5 * effect,
            "int4" => 0.02,
            _ => 1e-5,
        };
        assert!(error < tolerance, "{name}: {error}, {effect}");
    }
}

#[test]
fn each_matrix_has_the_scheme_that_its_name_asks_for() {
    let of = |name: &str| open(&fixture("quantized").join(name), |_| {}).unwrap().1;
    let scheme = |files: &WeightFiles, name: &str| files.quantization().unwrap().form(name).map(|form| form.scheme);
    let layer = |at: usize, name: &str| format!("model.layers.{at}.{name}.weight");
    let int4 = of("int4");
    let group = Scheme { sharing: Sharing::Group(16), ..Scheme::INT4 };
    assert_eq!(scheme(&int4, &layer(0, "self_attn.q_proj")), Some(group));
    assert_eq!(scheme(&int4, &layer(0, "self_attn.v_proj")), None);
    assert_eq!(scheme(&int4, &layer(1, "self_attn.v_proj")), Some(group));
    assert_eq!(scheme(&int4, "lm_head.weight"), Some(Scheme::INT8_WEIGHT_ONLY));
    assert_eq!(scheme(&int4, "model.embed_tokens.weight"), None);
    let rows = Scheme { codes: Codes::Int4, sharing: Sharing::Row, activations: Activations::Kept };
    assert_eq!(scheme(&of("int4-rows"), &layer(0, "mlp.down_proj")), Some(rows));
    assert_eq!(scheme(&of("int4-rows"), "lm_head.weight"), Some(Scheme::INT8_DYNAMIC));
    assert_eq!(scheme(&of("int8"), &layer(0, "mlp.up_proj")), Some(Scheme::INT8_DYNAMIC));
    assert_eq!(scheme(&of("int8-weights"), &layer(0, "self_attn.v_proj")), None);
    assert_eq!(scheme(&of("int8-weights"), &layer(0, "self_attn.k_proj")), Some(Scheme::INT8_WEIGHT_ONLY));
    assert_eq!(scheme(&of("fp8-tensor"), &layer(0, "mlp.up_proj")), Some(Scheme::FP8));
    let blocks = |side| Scheme { codes: Codes::E4m3, sharing: Sharing::Block(side), activations: Activations::Groups(16) };
    assert_eq!(scheme(&of("deepseek"), &layer(0, "mlp.up_proj")), Some(blocks(16)));
    let counts: Vec<_> = int4.quantization().unwrap().counts().into_iter().collect();
    assert_eq!(counts, [("int4-group-16-weight-only".to_owned(), 13), ("int8-weight-only".to_owned(), 1)]);
}

/// DeepSeek's own kernels: on a matrix of [132, 130] in blocks of 128, and a product in blocks of 32.
#[test]
fn ragged_blocks_are_deepseeks() {
    let files = WeightFiles::open(&fixture("quantized/blocks")).unwrap();
    let reference = |name: &str| files.stored(name).unwrap();
    let matrix = Quantized { scheme: Scheme::FP8_BLOCK, codes: reference("weight"), scales: reference("scale_inv") };
    let ours = matrix.dequantized(Kind::Float).unwrap().index_select(0, &reference("rows"));
    assert_eq!(ours, reference("values"));
    let scheme = Scheme { sharing: Sharing::Block(32), activations: Activations::Groups(32), ..Scheme::FP8_BLOCK };
    let matrix = Quantized { scheme, codes: reference("narrow"), scales: reference("narrow_scale_inv") };
    let error = relative_error(&matrix.product(&reference("x")).unwrap(), &reference("product"));
    assert!(error < 1e-6, "{error}");
}

/// DeepSeek-V3's kv_a_proj_with_mqa is the ragged one among its matrices.
#[test]
fn scales_of_ragged_blocks_are_asked_for_by_their_shape() {
    let mut json = json_of(&fixture("quantized/deepseek"));
    json["quantization_config"]["weight_block_size"] = json!([128, 128]);
    json["intermediate_size"] = 576.into();
    json["hidden_size"] = 7168.into();
    let config = ModelConfig::from_json(&json).unwrap();
    let quantization = Quantization::from_json(&json, &config).unwrap().unwrap();
    let gate = projections(&config).into_iter().find(|spec| spec.shape == [576, 7168]).unwrap();
    let parts = quantization.form(&gate.name).unwrap().parts(&gate);
    assert_eq!(
        (parts[1].name.as_str(), &parts[1].shapes),
        ("model.layers.0.mlp.gate_proj.weight_scale_inv", &vec![vec![5, 56]])
    );
}

#[test]
fn what_cannot_be_read_is_refused_by_its_field() {
    let whole = |field: &str| format!("/{field}");
    let group = |field: &str| format!("/config_groups/group_0/{field}");
    let (weights, inputs) =
        (|field: &str| group(&format!("weights/{field}")), |field: &str| group(&format!("input_activations/{field}")));
    let cases = [
        (
            "int8",
            whole("quant_method"),
            json!("gptq"),
            "quant_method = \"gptq\" cannot be read: compressed-tensors and fp8 can",
        ),
        ("int8", whole("quant_method"), json!(null), "quant_method"),
        ("int8", whole("kv_cache_scheme"), json!({"num_bits": 8}), "kv_cache_scheme cannot be read"),
        ("int8", whole("transform_config"), json!({"config_groups": {"r1": {}}}), "transform_config"),
        ("int8", whole("sparsity_config"), json!({"format": "sparse-24-bitmask"}), "sparsity_config"),
        ("int8", whole("quantization_status"), json!("frozen"), "quantization_status = \"frozen\""),
        ("int8", whole("config_groups"), json!([]), "config_groups cannot be read"),
        ("int8", whole("config_groups"), json!({"W8A8": ["Linear"]}), "config_groups.W8A8.weights.num_bits = null"),
        ("int8", whole("ignore"), json!("lm_head"), "ignore"),
        ("int8", whole("ignore"), json!(["re:(?!x).*"]), "ignore: pattern '(?!x).*' cannot be read"),
        ("int8", whole("ignore"), json!(["re:.*"]), "quantises no matrix"),
        ("int8", group("targets"), json!(["re:.*experts"]), "quantises no matrix"),
        ("int8", group("format"), json!("marlin-24"), "format = \"marlin-24\""),
        ("int8", group("format"), json!("float-quantized"), "format = \"float-quantized\" for"),
        ("int8", group("output_activations"), json!({"num_bits": 8}), "output_activations"),
        ("int8", weights("num_bits"), json!(2), "weights.num_bits = 2 cannot be read: 4 and 8 bits of int can"),
        ("int8", weights("type"), json!("nf"), "weights.type = \"nf\""),
        ("int8", weights("symmetric"), json!(false), "weights.symmetric = false"),
        ("int8", weights("actorder"), json!("group"), "weights.actorder = \"group\""),
        ("int8", weights("dynamic"), json!(true), "weights.dynamic = true"),
        ("int8", weights("strategy"), json!("tensor_group"), "weights.strategy = \"tensor_group\""),
        ("int8", weights("strategy"), json!("group"), "weights.group_size = null"),
        ("int8", inputs("dynamic"), json!(false), "input_activations.dynamic = false"),
        ("int8", inputs("symmetric"), json!(false), "input_activations.symmetric = false"),
        ("int8", inputs("strategy"), json!("tensor"), "input_activations.strategy = \"tensor\""),
        ("int8", inputs("num_bits"), json!(4), "input_activations.num_bits = 4"),
        ("deepseek", whole("fmt"), json!("e5m2"), "fmt = \"e5m2\""),
        ("deepseek", whole("activation_scheme"), json!("static"), "activation_scheme = \"static\""),
        ("deepseek", whole("scale_fmt"), json!("ue8m0"), "scale_fmt = \"ue8m0\""),
        ("deepseek", whole("weight_block_size"), json!(null), "weight_block_size = null"),
        ("deepseek", whole("weight_block_size"), json!([128, 64]), "weight_block_size = [128,64]"),
        ("deepseek", whole("weight_block_size"), json!([0, 0]), "weight_block_size = [0,0]"),
    ];
    for (name, field, value, told) in cases {
        let change = |json: &mut Value| {
            let (object, field) = field.rsplit_once('/').unwrap();
            json["quantization_config"].pointer_mut(object).unwrap()[field] = value;
        };
        let error = open(&fixture("quantized").join(name), change).map(drop).unwrap_err();
        assert!(error.starts_with("quantization_config") && error.contains(told), "{told}: {error}");
    }
}

type Tensors = Vec<(String, Tensor)>;
type Change = Box<dyn FnOnce(&mut Tensors)>;

/// A copy of a fixture with its tensors changed.
fn broken(name: &str, change: impl FnOnce(&mut Tensors)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let from = fixture("quantized").join(name);
    std::fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let mut tensors = Tensor::read_safetensors(from.join("model.safetensors")).unwrap();
    change(&mut tensors);
    Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
    let (config, files) = open(folder.path(), |_| {}).unwrap();
    network(&config, &files).map(drop).unwrap_err()
}

#[test]
fn broken_tensors_are_named() {
    let name = |ending: &str| format!("model.layers.0.mlp.down_proj.{ending}");
    let set = |ending: &'static str, value: Tensor| {
        move |tensors: &mut Tensors| {
            let at = tensors.iter().position(|(other, _)| *other == format!("model.layers.0.mlp.down_proj.{ending}")).unwrap();
            tensors[at].1 = value;
        }
    };
    let scales = |value: f64| Tensor::full([32, 1], value, (Kind::Float, tch::Device::Cpu));
    for (value, told) in [(0.0, "above 0"), (-1.0, "above 0"), (f64::NAN, "above 0"), (f64::INFINITY, "above 0")] {
        let one = scales(1.0);
        let _ = one.get(3).fill_(value);
        let error = broken("int8", set("weight_scale", one));
        assert!(error.contains(&name("weight_scale")) && error.contains(told), "{value}: {error}");
    }
    let cases: Vec<(&str, Change, String)> = vec![
        (
            "int8",
            Box::new(set("weight_scale", scales(1.0).view([1, 32]))),
            format!("{} has shape [1, 32], not [32, 1]", name("weight_scale")),
        ),
        (
            "int8",
            Box::new(set("weight", Tensor::zeros([32, 64], (Kind::Float, tch::Device::Cpu)))),
            format!("{} is of type F32: i8", name("weight")),
        ),
        (
            "int8",
            Box::new(|tensors| tensors.retain(|(name, _)| !name.ends_with("down_proj.weight_scale"))),
            format!("{} is missing", name("weight_scale")),
        ),
        (
            "int4",
            Box::new(set("weight_shape", Tensor::from_slice(&[32i64, 63]))),
            format!("{} says [32, 63], not [32, 64]", name("weight_shape")),
        ),
        (
            "int4",
            Box::new(set("weight_packed", Tensor::zeros([32, 7], (Kind::Int, tch::Device::Cpu)))),
            format!("{} has shape [32, 7], not [32, 8]", name("weight_packed")),
        ),
        (
            "int8",
            Box::new(|tensors| {
                tensors.push(("model.layers.0.mlp.down_proj.weight_zero_point".into(), Tensor::from_slice(&[0i8])))
            }),
            format!("{} is unexpected", name("weight_zero_point")),
        ),
    ];
    for (fixture, change, told) in cases {
        let error = broken(fixture, change);
        assert!(error.contains(&told), "{told}: {error}");
    }
}

/// Codes of four bits one a byte, as older tools write them.
#[test]
fn codes_beyond_their_bits_are_refused() {
    let four = |json: &mut Value| json["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4.into();
    let (config, files) = open(&fixture("quantized/int8"), four).unwrap();
    assert!(network(&config, &files).map(drop).unwrap_err().contains("holds codes outside -8 to 7"));
}

#[test]
fn a_code_that_is_no_number_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(fixture("quantized/fp8/model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let at = json["model.layers.0.mlp.down_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[header + at + 5] = 0xff;
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    std::fs::copy(fixture("quantized/fp8/config.json"), folder.path().join("config.json")).unwrap();
    let (config, files) = open(folder.path(), |_| {}).unwrap();
    let error = network(&config, &files).map(drop).unwrap_err();
    assert!(error.contains("model.layers.0.mlp.down_proj.weight holds NaN"), "{error}");
}
