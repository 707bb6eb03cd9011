//! The Models service: what is served, described to clients, with the bounds on their requests; and what comes and goes.

use std::sync::Arc;

use serde::Deserialize;
use tonic::{Request, Response, Status};

use super::access::Access;
use super::compare::{LANES_MAX, NAME_BYTES_MAX, REFERENCE_BYTES_MAX};
use super::proto::{
    self, GetModelRequest, GetModelResponse, ListModelsRequest, ListModelsResponse, LoadModelRequest, LoadModelResponse,
    UnloadModelRequest, UnloadModelResponse,
};
use super::registry::Registry;
use super::{ServeOptions, Served, convert, status};
use crate::draft::DrafterInfo;
use crate::engine::request::{
    AutoregressiveOptions, CFG_SCALE_MAX, DiffusionOptions, DrafterChoice, LOGIT_BIAS_MAX, LOGPROBS_MAX, MethodKind,
    PIECES_MAX, PRIORITY_MAX, PROMPT_BYTES_MAX, STEPS_MAX, STOP_BYTES_MAX, STOPS_MAX, TEMPERATURE_MAX, TEMPERATURE_MIN,
    unsupported,
};
use crate::engine::{Drafted, Load};
use crate::http::listen;
use crate::telemetry::account;
use crate::tensor::{Description, describe as describe_device};

/// The Models service.
pub struct ModelsService(pub Arc<Registry>);

#[tonic::async_trait]
impl proto::models_server::Models for ModelsService {
    async fn list(&self, request: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let registry = &self.0;
        let away =
            |(name, state): (String, proto::ModelState)| proto::Model { name, state: state.into(), ..Default::default() };
        let models = registry.all().iter().map(describe).chain(registry.away().into_iter().map(away)).collect();
        let loadable = registry.loadable().await?;
        let (limits, memory, caller) = (registry.limits(), registry.memory(), Access::of(request.extensions()).describe());
        Ok(Response::new(ListModelsResponse { models, limits: Some(limits), loadable, memory, caller }))
    }

    async fn get(&self, request: Request<GetModelRequest>) -> Result<Response<GetModelResponse>, Status> {
        let model = describe(&self.0.find(&request.into_inner().name)?);
        Ok(Response::new(GetModelResponse { model: Some(model), limits: Some(self.0.limits()) }))
    }

    async fn load(&self, request: Request<LoadModelRequest>) -> Result<Response<LoadModelResponse>, Status> {
        Access::of(request.extensions()).admin()?;
        let served = self.0.load(&named(request.into_inner().name)?).await?;
        Ok(Response::new(LoadModelResponse { model: Some(describe(&served)), memory: self.0.memory() }))
    }

    async fn unload(&self, request: Request<UnloadModelRequest>) -> Result<Response<UnloadModelResponse>, Status> {
        Access::of(request.extensions()).admin()?;
        self.0.unload(&named(request.into_inner().name)?).await?;
        Ok(Response::new(UnloadModelResponse { memory: self.0.memory() }))
    }
}

/// Which model comes or goes is never left open.
fn named(name: String) -> Result<String, Status> {
    if name.is_empty() { Err(status::bad_field("name", "it is empty: name the model")) } else { Ok(name) }
}

pub fn describe(model: &Served) -> proto::Model {
    let (info, bounds) = (&model.info, model.engine.bounds());
    let (config, generation) = (&info.config, &info.generation);
    let parameters = config.parameters() as u64;
    let can = |method| unsupported(info, method).is_none();
    let (diffusion, autoregressive) = (can(MethodKind::Diffusion), can(MethodKind::Autoregressive));
    let autoregressive_defaults =
        generation.autoregressive.as_ref().and_then(|json| AutoregressiveOptions::deserialize(json).ok());
    let defaults = generation.diffusion.as_ref().and_then(|json| DiffusionOptions::deserialize(json).ok());
    proto::Model {
        name: info.name.clone(),
        family: config.family.name.into(),
        architectures: config.family.architectures.iter().map(|name| (*name).into()).collect(),
        shape: Some(proto::Shape {
            layers: config.layers as u64,
            hidden_size: config.hidden_size as u64,
            heads: config.heads as u64,
            kv_heads: config.kv_heads as u64,
            head_size: config.head_dim as u64,
            intermediate_size: config.intermediate_size as u64,
            vocabulary_size: config.vocab_size as u64,
        }),
        parameters,
        mask_token_id: info.mask_token_id.as_ref().ok().copied(),
        end_token_ids: generation.eos_token_ids.clone(),
        shift: config.shift,
        context: info.context as u64,
        dtype: info.placement.dtype.name().into(),
        device: info.placement.device_name(),
        quantization: info.quantization.map(|scheme| scheme.to_string()).unwrap_or_default(),
        weight_bytes: info.weight_bytes as u64,
        default_max_new_tokens: info.default_canvas() as u64,
        default_diffusion: Some(convert::diffusion_message(&defaults.unwrap_or_default())),
        default_sampling: Some(proto::Sampling {
            temperature: generation.temperature,
            top_p: generation.top_p,
            top_k: generation.top_k,
            ..proto::Sampling::default()
        }),
        capabilities: Some(proto::Capabilities {
            diffusion,
            autoregressive,
            infill: diffusion,
            chat: info.tokenizer.chat().is_some(),
        }),
        default_autoregressive: Some(convert::autoregressive_message(&autoregressive_defaults.unwrap_or_default())),
        drafted: autoregressive.then(|| {
            let Drafted { speculation, drafting, verifying, committing } = model.engine.drafted();
            super::events::speculation(&speculation, drafting, verifying, committing)
        }),
        drafters: info.drafters.iter().filter(|_| autoregressive).map(drafter).collect(),
        resident_max: bounds.resident as u64,
        queued_max: bounds.queued as u64,
        resident_tokens_max: bounds.tokens as u64,
        queued_tokens_max: bounds.queued_tokens as u64,
        load: Some(load(model.engine.load())),
        threads: tch::get_num_threads().max(0) as u32,
        state: proto::ModelState::Ready.into(),
        processor: Some(processor(describe_device(info.placement.device))),
    }
}

fn processor(description: Description) -> proto::Processor {
    let Description { name, memory, memory_free, compute_capability, driver, runtime, instructions } = description;
    proto::Processor {
        name,
        memory_bytes: memory,
        memory_free_bytes: memory_free,
        compute_capability,
        cuda_driver: driver,
        cuda_runtime: runtime,
        instructions: instructions.into_iter().map(Into::into).collect(),
    }
}

fn load(load: Load) -> proto::Load {
    proto::Load {
        waiting: load.waiting as u64,
        resident: load.residents as u64,
        resident_tokens: load.tokens as u64,
        prefix_tokens: load.prefix_tokens as u64,
        rounds: load.rounds,
        steps: load.steps,
        working_seconds: load.working.as_secs_f64(),
        scheduling_seconds: load.scheduling.as_secs_f64(),
        coalesced_steps: load.coalesced,
    }
}

fn drafter(info: &DrafterInfo) -> proto::DrafterLimits {
    proto::DrafterLimits {
        drafter: convert::drafter(DrafterChoice::Use(info.kind)).into(),
        draft_length_max: info.limit.length as u64,
        beam_width_max: info.limit.width as u64,
        usual_draft_length: info.usual.length as u64,
        usual_beam_width: info.usual.width as u64,
    }
}

pub fn limits(options: &ServeOptions) -> proto::Limits {
    proto::Limits {
        message_bytes_max: options.message_bytes_max as u64,
        prompt_bytes_max: PROMPT_BYTES_MAX as u64,
        steps_max: STEPS_MAX,
        stop_strings_max: STOPS_MAX as u64,
        stop_bytes_max: STOP_BYTES_MAX as u64,
        logit_bias_max: LOGIT_BIAS_MAX as u64,
        template_pieces_max: PIECES_MAX as u64,
        temperature_max: TEMPERATURE_MAX,
        cfg_scale_max: CFG_SCALE_MAX,
        logprobs_max: u64::from(LOGPROBS_MAX),
        lanes_max: LANES_MAX as u64,
        reference_bytes_max: REFERENCE_BYTES_MAX as u64,
        request_seconds_max: options.request_time_max.as_secs_f64(),
        streams_per_connection_max: options.streams_per_connection_max,
        lane_name_bytes_max: NAME_BYTES_MAX as u64,
        request_id_bytes_max: account::ID_BYTES_MAX as u64,
        priority_max: PRIORITY_MAX,
        temperature_min: TEMPERATURE_MIN,
        connections_max: options.connections_max as u64,
        header_bytes_max: u64::from(listen::HEADER_BYTES_MAX),
        opening_seconds_max: listen::OPENING_TIME_MAX.as_secs_f64(),
        header_seconds_max: listen::HEADER_TIME_MAX.as_secs_f64(),
        keepalive_seconds: listen::KEEPALIVE_INTERVAL.as_secs_f64(),
        keepalive_timeout_seconds: listen::KEEPALIVE_TIMEOUT.as_secs_f64(),
        pending_resets_max: listen::PENDING_RESETS_MAX as u64,
        drain_seconds: options.drain_timeout.as_secs_f64(),
        choices_max: crate::http::api::CHOICES_MAX,
    }
}
