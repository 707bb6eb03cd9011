//! A forward as one launch of our own kernels, on the CPU.
//!
//! The operations are those of [`Transformer::forward`] over tensors, in the same order and to the bit. But the threads start once, and what lies
//! between two operations is written where that of the layer before was: in a step of one token, starting threads and making tensors
//! takes as long as computing does (docs/LOG.md). Where a weight's form knows tensors only, there is no such list, and the other way
//! is taken.

use super::forward::{Plan, spans};
use super::{Layer, ModelError, Transformer};
use crate::tensor::kernels::attention::{Shared, attend};
use crate::tensor::kernels::pointwise::{add_norm, embed, gate, norm};
use crate::tensor::kernels::turns::{Rows, Turns};
use crate::tensor::{Device, Tensor};

/// What a layer's operations read and write, `[rows, ...]` each.
struct Room {
    /// The residual stream.
    x: Rows,
    normed: Rows,
    qkv: Rows,
    mixed: Rows,
    /// What the attention, then the gated unit, adds to the stream.
    more: Rows,
    gate_up: Rows,
    gated: Rows,
}

impl Transformer {
    /// Final hidden states of `tokens: [rows]` at these positions, `[rows, hidden]`; `None` where it takes tensors.
    pub(super) fn at_once(&self, tokens: &[i64], positions: &[usize], plans: &[Plan]) -> Result<Option<Tensor>, ModelError> {
        let c = &self.config;
        let heads = c.heads * c.head_dim;
        let widths = [
            c.hidden_size,
            heads + 2 * c.kv_heads * c.head_dim,
            heads,
            c.hidden_size,
            2 * c.intermediate_size,
            c.intermediate_size,
        ];
        let options = (self.placement.dtype.kind(), Device::Cpu);
        let make = |width: usize| Tensor::f_empty([positions.len() as i64, width as i64], options);
        let (normed, between) = (make(c.hidden_size)?, make(widths.iter().sum())?);
        let mut turns = Turns::default();
        let mut list = || {
            let [x, qkv, mixed, more, gate_up, gated] = Rows::of(&between)?.cut(widths);
            let room = Room { x, normed: Rows::of(&normed)?, qkv, mixed, more, gate_up, gated };
            embed(self.embedding.rows()?, tokens, room.x, &mut turns)?;
            self.list(&room, positions, plans, &mut turns)
        };
        if list().is_none() {
            return Ok(None);
        }
        // SAFETY: the list has to do with these tensors, the model's and the caches', which all outlive it.
        unsafe { turns.run() };
        Ok(Some(normed))
    }

    /// All layers, from the stream as it is embedded to the final norm.
    fn list(&self, room: &Room, positions: &[usize], plans: &[Plan], turns: &mut Turns) -> Option<()> {
        let eps = self.config.norm_eps;
        norm(room.x, self.layers.first()?.attention_norm.rows()?, eps, room.normed, turns)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.qkv.turn(room.normed, room.qkv, turns)?;
            attend(&self.shared(layer, positions), room.qkv, room.mixed, &spans(plans, index)?, turns)?;
            layer.output.turn(room.mixed, room.more, turns)?;
            add_norm(room.x, room.more, layer.mlp_norm.rows()?, eps, room.normed, turns)?;
            layer.gate_up.turn(room.normed, room.gate_up, turns)?;
            gate(room.gate_up, room.gated, turns)?;
            layer.down.turn(room.gated, room.more, turns)?;
            let next = self.layers.get(index + 1).map_or(&self.norm, |next| &next.attention_norm);
            add_norm(room.x, room.more, next.rows()?, eps, room.normed, turns)?;
        }
        Some(())
    }

    /// What all rows of a layer's attention share.
    pub(super) fn shared<'a>(&'a self, layer: &'a Layer, positions: &'a [usize]) -> Shared<'a> {
        let c = &self.config;
        Shared {
            heads: c.heads,
            kv_heads: c.kv_heads,
            dim: c.head_dim,
            angles: self.rotary.tables(),
            positions,
            norms: layer.qk_norm.as_ref().map(|(query, key)| (query, key)),
            eps: c.norm_eps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::Blocks;
    use super::super::forward::Way;
    use super::super::quantized::{Activations, Codes, Matrix, Quantized, Scheme};
    use super::super::{Layout, RandomWeights, Segment, Source, TensorSpec};
    use super::*;
    use crate::checkpoint::config::ModelConfig;
    use crate::model::cache::KvCache;
    use crate::tensor::{Dtype, Kind, Placement};

    /// How matrices come.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Form {
        Plain,
        Halves,
        Blocks,
        Quantized(Scheme),
    }

    /// Random weights, rounded.
    struct Rounded(RandomWeights, Form);

    impl Source for Rounded {
        type Error = ModelError;

        fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, ModelError> {
            let random = self.0.tensor(spec)?;
            // Norms and biases that do something.
            Ok(if spec.shape.len() == 1 { random * 0.7 } else { random })
        }

        fn matrix(&mut self, spec: &TensorSpec) -> Result<Matrix, ModelError> {
            let weight = self.tensor(spec)?;
            let floats = weight.to_kind(Kind::Float);
            Ok(match self.1 {
                Form::Plain => Matrix::Plain(weight),
                Form::Halves => Matrix::Halves(weight.to_kind(Kind::BFloat16)),
                Form::Blocks => Matrix::Blocks(Blocks {
                    codes: (floats * 100.0 + 8.0).clamp(0.0, 15.0).to_kind(Kind::Uint8),
                    scales: Tensor::full([spec.shape[0], spec.shape[1] / 32], 0.01, (Kind::Float, Device::Cpu)),
                    minima: Tensor::full([spec.shape[0], spec.shape[1] / 32], -0.08, (Kind::Float, Device::Cpu)),
                }),
                Form::Quantized(scheme) => Matrix::Quantized(Quantized::of(&floats, scheme)?),
            })
        }
    }

    /// Biases, shared key heads, every form of weights, few rows and many, by several threads.
    #[test]
    fn one_launch_computes_what_many_do() {
        let json = serde_json::json!({
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(&json).unwrap();
        assert!(config.qkv_bias);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let placement = Placement { device: Device::Cpu, dtype };
            let schemes = Scheme::NAMED.iter().map(|(_, scheme)| Form::Quantized(*scheme));
            for form in [Form::Plain, Form::Halves, Form::Blocks].into_iter().chain(schemes) {
                let model = Transformer::new(&config, placement, 64, &mut Rounded(RandomWeights { placement }, form)).unwrap();
                let forward = |way: Way, lengths: &[usize]| {
                    let caches: Vec<KvCache> = lengths.iter().map(|_| KvCache::new(&config, placement, 40).unwrap()).collect();
                    let texts: Vec<Vec<u32>> = lengths.iter().map(|length| (0..*length as u32).collect()).collect();
                    let segments = texts.iter().zip(&caches);
                    let segments =
                        segments.map(|(tokens, cache)| Segment { tokens, layout: Layout::Causal, cache: Some(cache) });
                    tch::no_grad(|| model.forward_by(&segments.collect::<Vec<_>>(), way).unwrap())
                };
                for (threads, lengths) in [(2, &[1][..]), (1, &[5, 1]), (2, &[1, 1, 1, 1, 1, 3]), (3, &[33, 1, 20]), (2, &[17])]
                {
                    crate::tensor::set_threads(threads);
                    let case = format!("{dtype:?}, {form:?}: {lengths:?} by {threads}");
                    assert!(forward(Way::AtOnce, lengths).equal(&forward(Way::Kernels, lengths)), "{case}");
                }
                // Floats of eight bits are rounded by libtorch where rows are, too; everything else has a list.
                let tensors =
                    matches!(form, Form::Quantized(s) if s.codes == Codes::E4m3 && s.activations != Activations::Kept);
                let cache = KvCache::new(&config, placement, 8).unwrap();
                let segment = Segment { tokens: &[1], layout: Layout::Causal, cache: Some(&cache) };
                let mut positions = vec![];
                let plans = [model.plan(&segment, 0, true, &mut positions).unwrap()];
                let list = |plans: &[Plan]| tch::no_grad(|| model.at_once(&[1], &positions, plans)).unwrap();
                assert_eq!(list(&plans).is_none(), tensors, "{dtype:?}, {form:?}");
                assert!(list(&[]).is_none(), "a row that no segment has");
            }
        }
    }
}
