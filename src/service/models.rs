//! The models that are served: found by name, described to clients, and a bound on the work of checking their requests.

use std::sync::Arc;

use serde::Deserialize;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::compare::{LANES_MAX, REFERENCE_BYTES_MAX};
use super::proto::{self, GetModelRequest, GetModelResponse, ListModelsRequest, ListModelsResponse};
use super::{ServeError, ServeOptions, Served, convert, status};
use crate::draft::DrafterInfo;
use crate::engine::request::{
    AutoregressiveOptions, CFG_SCALE_MAX, DiffusionOptions, DrafterChoice, LOGIT_BIAS_MAX, LOGPROBS_MAX, MethodKind,
    PIECES_MAX, PROMPT_BYTES_MAX, STEPS_MAX, STOP_BYTES_MAX, STOPS_MAX, TEMPERATURE_MAX, unsupported,
};
use crate::engine::{Drafted, Engine, Load};

/// The served models; there is at least one.
pub struct Registry {
    models: Vec<Served>,
    limits: proto::Limits,
    /// Tokenising and templating take a core each; more at once would only take the cores from the engine.
    checks: Arc<Semaphore>,
}

impl Registry {
    pub fn new(models: Vec<Served>, options: &ServeOptions) -> Result<Self, ServeError> {
        if models.is_empty() {
            return Err(ServeError::NoModel);
        }
        for (at, model) in models.iter().enumerate() {
            if models[..at].iter().any(|other| other.info.name == model.info.name) {
                return Err(ServeError::SameName(model.info.name.clone()));
            }
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { models, limits: limits(options), checks: Arc::new(Semaphore::new(cores)) })
    }

    pub fn all(&self) -> &[Served] {
        &self.models
    }

    pub fn engines(&self) -> impl Iterator<Item = &Engine> {
        self.models.iter().map(|model| &model.engine)
    }

    /// A model by its name; the first one if `name` is empty.
    pub fn find(&self, name: &str) -> Result<&Served, Status> {
        self.models.iter().find(|model| name.is_empty() || model.info.name == name).ok_or_else(|| {
            let known: Vec<_> = self.models.iter().map(|model| model.info.name.as_str()).collect();
            status::unknown_model(name, &known.join(", "))
        })
    }

    /// Runs work that takes milliseconds of a core, off the threads that serve the network.
    pub async fn off_thread<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
        let permit = self.checks.clone().acquire_owned().await.map_err(|_| status::fault("the checks are closed", None))?;
        let work = tokio::task::spawn_blocking(move || {
            // Kept by the work itself: a caller that gives up does not stop it.
            let _permit = permit;
            work()
        });
        work.await.map_err(|_| status::fault("a check panicked", None))
    }
}

/// The Models service.
pub struct ModelsService(pub Arc<Registry>);

#[tonic::async_trait]
impl proto::models_server::Models for ModelsService {
    async fn list(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let models = self.0.models.iter().map(describe).collect();
        Ok(Response::new(ListModelsResponse { models, limits: Some(self.0.limits) }))
    }

    async fn get(&self, request: Request<GetModelRequest>) -> Result<Response<GetModelResponse>, Status> {
        let model = describe(self.0.find(&request.into_inner().name)?);
        Ok(Response::new(GetModelResponse { model: Some(model), limits: Some(self.0.limits) }))
    }
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
        weight_bytes: parameters * info.placement.dtype.size() as u64,
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

fn limits(options: &ServeOptions) -> proto::Limits {
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
    }
}
