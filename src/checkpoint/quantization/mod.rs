//! Which matrices of a checkpoint are stored in fewer bits, and how: `config.json`'s `quantization_config`, read once into a
//! [`Quantization`], in the conventions of compressed-tensors (vLLM, llm-compressor) and of DeepSeek's blocks.
//!
//! What a matrix's codes and scales mean is [`crate::model::quantized`]'s; how they lie in tensors, [`tensors`]'. What cannot be read
//! faithfully is refused by its field.

pub mod tensors;

use std::collections::BTreeMap;

use regex::Regex;
use safetensors::Dtype as StoredType;
use serde_json::Value;

use super::config::ModelConfig;
use crate::model::quantized::{Activations, Codes, Scheme, Sharing};
use crate::model::{TensorSpec, manifest};

/// Larger groups and blocks than anybody makes.
const SHARED_MAX: u64 = 1 << 16;
/// Longer lists of targets than any model needs.
const PATTERNS_MAX: usize = 4096;

/// How a model's matrices are stored.
#[derive(Clone, Debug)]
pub struct Quantization {
    /// Whose convention it is: the field `quant_method`.
    pub method: &'static str,
    /// By the name of the float tensor that each stands for.
    forms: BTreeMap<String, Form>,
}

/// How one matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    pub scheme: Scheme,
    pub layout: Layout,
    /// One scale for all of it, which a loaded matrix repeats for its rows.
    pub whole: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `weight` and `weight_scale`, one code an element.
    Elements,
    /// `weight` and `weight_scale_inv`, which despite its name multiplies.
    DeepSeek,
    /// `weight_packed`, words of 32 bits with so many for a code, and `weight_scale` and `weight_shape`.
    Packed(u32),
}

/// A tensor that a form is made of, with the shapes and types that it may have.
pub struct Part {
    pub name: String,
    pub shapes: Vec<Vec<i64>>,
    pub types: &'static [StoredType],
}

const FLOATS: &[StoredType] = &[StoredType::F32, StoredType::F16, StoredType::BF16];

impl Form {
    /// The tensors in which the matrix `spec` is stored: its codes, its scales, and what else there is.
    pub fn parts(&self, spec: &TensorSpec) -> Vec<Part> {
        let part = |ending: &str, shapes, types| Part { name: format!("{}{ending}", spec.name), shapes, types };
        let (outputs, inputs) = (spec.shape[0], spec.shape[1]);
        let codes = match (self.layout, self.scheme.codes) {
            (Layout::Packed(bits), _) => {
                part("_packed", vec![vec![outputs, (inputs * i64::from(bits) + 31) / 32]], &[StoredType::I32])
            }
            (_, Codes::E4m3) => part("", vec![spec.shape.clone()], &[StoredType::F8_E4M3]),
            (_, Codes::Int8 | Codes::Int4) => part("", vec![spec.shape.clone()], &[StoredType::I8]),
        };
        let (rows, columns) = self.scheme.grid(inputs as usize);
        let scales = match self.scheme.sharing {
            Sharing::Row if self.whole => vec![vec![1], vec![], vec![1, 1]],
            Sharing::Row => vec![vec![outputs, 1], vec![outputs]],
            _ => vec![vec![(outputs as usize).div_ceil(rows) as i64, (inputs as usize).div_ceil(columns) as i64]],
        };
        let scales = part(if self.layout == Layout::DeepSeek { "_scale_inv" } else { "_scale" }, scales, FLOATS);
        let shape = part("_shape", vec![vec![2]], &[StoredType::I64, StoredType::I32]);
        if matches!(self.layout, Layout::Packed(_)) { vec![codes, scales, shape] } else { vec![codes, scales] }
    }
}

impl Quantization {
    /// What `config.json` says of a model's matrices; none where it says nothing.
    pub fn from_json(json: &Value, config: &ModelConfig) -> Result<Option<Self>, String> {
        let json = match json.get("quantization_config") {
            None | Some(Value::Null) => return Ok(None),
            Some(json) => Field { path: "quantization_config".into(), value: json },
        };
        let projections = &projections(config);
        let method = json.at("quant_method");
        let (method, forms) = match method.text()? {
            Some("compressed-tensors") => ("compressed-tensors", compressed_tensors(&json, projections)?),
            Some("fp8") => ("fp8", deepseek(&json, projections, &format!("{}.weight", config.family.names.head))?),
            _ => return Err(method.refused("compressed-tensors and fp8 can be read")),
        };
        if forms.is_empty() {
            return Err(format!("{} quantises no matrix of this model", json.path));
        }
        Ok(Some(Self { method, forms }))
    }

    /// How the matrix that this tensor would be is stored; none if it is stored as it is.
    pub fn form(&self, tensor: &str) -> Option<&Form> {
        self.forms.get(tensor)
    }

    /// Each scheme's name, with how many matrices have it.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        self.forms.values().for_each(|form| *counts.entry(form.scheme.to_string()).or_default() += 1);
        counts
    }
}

/// The matrices of a model that may be quantised: all but the embedding, with the vocabulary's head where it has weights of its own.
pub fn projections(config: &ModelConfig) -> Vec<TensorSpec> {
    let embedding = format!("{}.weight", config.family.names.embedding);
    manifest(config).into_iter().filter(|spec| spec.shape.len() == 2 && spec.name != embedding).collect()
}

/// A value of the config with its way there, so that errors can name it.
struct Field<'a> {
    path: String,
    value: &'a Value,
}

impl<'a> Field<'a> {
    fn at(&self, name: &str) -> Field<'a> {
        Field { path: format!("{}.{name}", self.path), value: self.value.get(name).unwrap_or(&Value::Null) }
    }

    fn refused(&self, can: &str) -> String {
        let value = match self.value {
            Value::Object(_) | Value::Array(_) => String::new(),
            value => format!(" = {value}"),
        };
        format!("{}{value} cannot be read: {can}", self.path)
    }

    fn text(&self) -> Result<Option<&'a str>, String> {
        match self.value {
            Value::Null => Ok(None),
            value => value.as_str().map(Some).ok_or_else(|| self.refused("it is no text")),
        }
    }

    fn flag(&self) -> Result<Option<bool>, String> {
        match self.value {
            Value::Null => Ok(None),
            value => value.as_bool().map(Some).ok_or_else(|| self.refused("true or false can")),
        }
    }

    fn count(&self) -> Result<usize, String> {
        let count = self.value.as_u64().filter(|n| (1..=SHARED_MAX).contains(n));
        count.map(|n| n as usize).ok_or_else(|| self.refused(&format!("whole numbers from 1 to {SHARED_MAX} can")))
    }

    fn texts(&self) -> Result<Vec<&'a str>, String> {
        let list = match self.value {
            Value::Null => return Ok(vec![]),
            value => value.as_array().filter(|list| list.len() <= PATTERNS_MAX),
        };
        let texts = list.and_then(|list| list.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| self.refused(&format!("lists of at most {PATTERNS_MAX} texts can")))
    }

    /// Refuses anything but nothing at all: null, false, or an object without fields.
    fn absent(&self, what: &str) -> Result<(), String> {
        match self.value {
            Value::Null | Value::Bool(false) => Ok(()),
            Value::Object(fields) if fields.is_empty() => Ok(()),
            _ => Err(self.refused(&format!("there is no support for {what}"))),
        }
    }
}

/// A module's name, or a pattern that its beginning has to match.
enum Pattern {
    Name(String),
    Beginning(Regex),
}

impl Pattern {
    fn new(text: &str, field: &Field) -> Result<Self, String> {
        let Some(pattern) = text.strip_prefix("re:") else { return Ok(Self::Name(text.into())) };
        // Python's look-around is more than can be matched in linear time.
        let compiled = Regex::new(&format!("^(?:{pattern})"));
        let pattern = compiled.map_err(|_| format!("{}: pattern '{pattern}' cannot be read", field.path))?;
        Ok(Self::Beginning(pattern))
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Name(name) => name == module,
            Self::Beginning(pattern) => pattern.is_match(module),
        }
    }
}

fn module(spec: &TensorSpec) -> &str {
    spec.name.strip_suffix(".weight").unwrap_or(&spec.name)
}

fn compressed_tensors(json: &Field, projections: &[TensorSpec]) -> Result<BTreeMap<String, Form>, String> {
    json.at("kv_cache_scheme").absent("quantised caches")?;
    json.at("transform_config").absent("weights that are rotated")?;
    let sparsity = json.at("sparsity_config");
    if sparsity.at("format").text()?.is_none_or(|format| format != "dense") {
        sparsity.absent("sparse weights")?;
    }
    let status = json.at("quantization_status");
    if status.text()?.is_some_and(|status| status != "compressed") {
        return Err(status.refused("only compressed can"));
    }
    let groups = json.at("config_groups");
    let object = groups.value.as_object().ok_or_else(|| groups.refused("an object of groups can"))?;
    // By target, names before patterns, each in the order of the alphabet: the first that matches decides, and of a module's class it
    // is asked last.
    let mut targets: BTreeMap<(bool, &str), (Pattern, Form)> = BTreeMap::new();
    for name in object.keys() {
        let group = groups.at(name);
        let form = form(&group, json.at("format").text()?)?;
        let field = group.at("targets");
        for target in field.texts()? {
            targets.insert((target.starts_with("re:"), target), (Pattern::new(target, &field)?, form));
        }
    }
    let field = json.at("ignore");
    let ignored = field.texts()?.into_iter().map(|text| Pattern::new(text, &field)).collect::<Result<Vec<_>, _>>()?;
    let of_class = targets.get(&(false, "Linear")).map(|(_, form)| *form);
    let mut forms = BTreeMap::new();
    for spec in projections {
        let matches =
            |pattern: &Pattern| pattern.matches(module(spec)) || matches!(pattern, Pattern::Name(name) if name == "Linear");
        if ignored.iter().any(matches) {
            continue;
        }
        let named = targets.values().find(|(pattern, _)| pattern.matches(module(spec))).map(|(_, form)| *form);
        forms.extend(named.or(of_class).map(|form| (spec.name.clone(), form)));
    }
    Ok(forms)
}

/// How the matrices of a group are stored; `format` is what all groups have that name none.
fn form(group: &Field, format: Option<&str>) -> Result<Form, String> {
    group.at("output_activations").absent("quantised outputs")?;
    let weights = group.at("weights");
    weights.at("dynamic").absent("weights that are quantised as they run")?;
    if weights.at("symmetric").flag()? == Some(false) {
        return Err(weights.at("symmetric").refused("there is no support for zero points"));
    }
    let order = weights.at("actorder");
    if !matches!(order.value.as_str(), Some("weight" | "static")) {
        order.absent("inputs in another order")?;
    }
    let bits = weights.at("num_bits");
    let kind = weights.at("type");
    let codes = match (kind.text()?.unwrap_or("int"), bits.value.as_u64()) {
        ("int", Some(8)) => Codes::Int8,
        ("int", Some(4)) => Codes::Int4,
        ("float", Some(8)) => Codes::E4m3,
        ("int", _) => return Err(bits.refused("4 and 8 bits of int can")),
        ("float", _) => return Err(bits.refused("8 bits of float can")),
        _ => return Err(kind.refused("int and float can")),
    };
    let own = group.at("format");
    let layout = match (own.text()?.or(format), codes) {
        (Some("pack-quantized"), Codes::Int8) => Layout::Packed(8),
        (Some("pack-quantized"), Codes::Int4) => Layout::Packed(4),
        (Some("int-quantized" | "naive-quantized"), Codes::Int8 | Codes::Int4) => Layout::Elements,
        (Some("float-quantized" | "naive-quantized"), Codes::E4m3) => Layout::Elements,
        (Some(other), _) => {
            let can = "int-quantized, float-quantized, naive-quantized and pack-quantized can";
            return Err(format!("{} = \"{other}\" for {} cannot be read: {can}", own.path, kind.path));
        }
        (None, _) => return Err(own.refused("it is missing")),
    };
    let strategy = weights.at("strategy");
    let (sharing, whole) = match strategy.text()? {
        Some("channel") => (Sharing::Row, false),
        Some("tensor") => (Sharing::Row, true),
        Some("group") => (Sharing::Group(weights.at("group_size").count()?), false),
        Some("block") => (Sharing::Block(square(&weights.at("block_structure"))?), false),
        _ => return Err(strategy.refused("channel, tensor, group and block can")),
    };
    Ok(Form {
        scheme: Scheme { codes, sharing, activations: activations(&group.at("input_activations"), codes)? },
        layout,
        whole,
    })
}

fn activations(field: &Field, codes: Codes) -> Result<Activations, String> {
    if field.value.is_null() {
        return Ok(Activations::Kept);
    }
    let sort = if codes == Codes::E4m3 { "float" } else { "int" };
    let only = |name: &str, value: Value, can: &str| {
        let part = field.at(name);
        if *part.value == value { Ok(()) } else { Err(part.refused(can)) }
    };
    only("dynamic", true.into(), "there is no support for input scales that are set beforehand")?;
    only("symmetric", true.into(), "there is no support for zero points")?;
    only("num_bits", 8.into(), "8 bits can")?;
    only("type", sort.into(), "what weights are of can")?;
    let strategy = field.at("strategy");
    match strategy.text()? {
        Some("token") => Ok(Activations::Rows),
        Some("group") => Ok(Activations::Groups(field.at("group_size").count()?)),
        // One scale for all tokens would make each depend on its neighbours.
        _ => Err(strategy.refused("token and group can")),
    }
}

/// The side of blocks as high as they are wide.
fn square(field: &Field) -> Result<usize, String> {
    let sides = field.value.as_array().filter(|sides| sides.len() == 2 && sides[0] == sides[1]);
    let side = sides.and_then(|sides| sides[0].as_u64()).filter(|n| (1..=SHARED_MAX).contains(n));
    side.map(|n| n as usize)
        .ok_or_else(|| format!("{} = {} cannot be read: squares like [128, 128] can", field.path, field.value))
}

fn deepseek(json: &Field, projections: &[TensorSpec], head: &str) -> Result<BTreeMap<String, Form>, String> {
    let fmt = json.at("fmt");
    if fmt.text()?.is_some_and(|fmt| fmt != "e4m3") {
        return Err(fmt.refused("e4m3 can"));
    }
    let scheme = json.at("activation_scheme");
    if scheme.text()? != Some("dynamic") {
        return Err(scheme.refused("dynamic can"));
    }
    let scales = json.at("scale_fmt");
    if scales.text()?.is_some_and(|fmt| fmt != "float") {
        return Err(scales.refused("float can"));
    }
    json.at("modules_to_convert").absent("quantised embeddings")?;
    let side = square(&json.at("weight_block_size"))?;
    let scheme = Scheme { codes: Codes::E4m3, sharing: Sharing::Block(side), activations: Activations::Groups(side) };
    let form = Form { scheme, layout: Layout::DeepSeek, whole: false };
    let kept: Vec<_> =
        ["modules_to_not_convert", "ignored_layers"].iter().map(|name| json.at(name).texts()).collect::<Result<_, _>>()?;
    let kept = kept.concat();
    // A name there means the module and all within it, with or without what stands before.
    let keeps = |module: &str| {
        let within = |name: &&str| module.strip_prefix(*name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        kept.iter().any(|name| within(name) || module.ends_with(&format!(".{name}")) || module.contains(&format!(".{name}.")))
    };
    let quantised = projections.iter().filter(|spec| spec.name != head && !keeps(module(spec)));
    Ok(quantised.map(|spec| (spec.name.clone(), form)).collect())
}
