//! Compare: one prompt, several lanes. Every lane becomes a request of its own and is checked before any of them begins; then they run
//! in turn or all at once, each as a stream of [`lane`] events that ends with its summary, for which [`judge`] scores the text.
//!
//! Like a generation's, the stream is pulled: dropping it drops the lanes that run, which cancels them.

mod judge;
mod lane;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::stream::{self, Stream, StreamExt};
use tonic::Status;

use super::access::Access;
use super::proto::{self, CompareEvent, CompareRequest, GenerateRequest, compare_request, generate_request};
use super::registry::Registry;
use super::status::{self, bad_field};
use super::{Served, convert};
use crate::engine::request::{MethodKind, unsupported, validate};
use crate::telemetry::Trace;
use judge::Judge;
use lane::Lane;

/// Lanes of one comparison.
pub const LANES_MAX: usize = 16;
/// The time to compare a text with a reference grows with the length of both: this keeps it near a second.
pub const REFERENCE_BYTES_MAX: usize = 16 << 10;
/// Bytes of a lane's name.
pub const NAME_BYTES_MAX: usize = 128;

pub type CompareStream = Pin<Box<dyn Stream<Item = Result<CompareEvent, Status>> + Send>>;

/// Checks the request and starts it; `id` is the request's, and what it does is told to `trace`. The stream ends with the first error.
pub async fn compare(
    registry: &Arc<Registry>,
    mut request: CompareRequest,
    id: String,
    deadline: Instant,
    trace: Trace,
    access: &Access,
) -> Result<CompareStream, Status> {
    // Lanes are submitted one by one, as their turns come; a server that stops is better told of at once.
    if registry.draining() {
        return Err(status::stopping());
    }
    if request.lanes.is_empty() || request.lanes.len() > LANES_MAX {
        return Err(bad_field("lanes", format!("{} lanes are not from 1 to {LANES_MAX}", request.lanes.len())));
    }
    if let Some(reference) = request.reference.as_ref().filter(|reference| reference.len() > REFERENCE_BYTES_MAX) {
        return Err(bad_field("reference", format!("{} bytes are more than {REFERENCE_BYTES_MAX}", reference.len())));
    }
    let racing = match proto::LaneOrder::try_from(request.order) {
        Ok(order) => order == proto::LaneOrder::Racing,
        Err(_) => return Err(bad_field("order", format!("{} is not a value of this enum", request.order))),
    };
    let judge = Arc::new(Judge::new(registry, &request, &id, deadline, access)?);
    let models: Vec<Served> =
        (0..).zip(&request.lanes).map(|(at, lane)| model(registry, at, lane)).collect::<Result<_, _>>()?;
    models.iter().try_for_each(|model| access.model(&model.info.name))?;
    let fewer: Vec<_> = models.iter().filter_map(|model| access.fewer_new_tokens(model.info.default_canvas())).collect();
    if let Some(fewer) = fewer.first() {
        request.stopping.get_or_insert_default().max_new_tokens.get_or_insert(*fewer);
    }
    let checked = registry.off_thread(move || {
        let seed = rand::random();
        let lane = |(at, model)| checked(&request, at, model, &id, seed, deadline, &judge);
        models.into_iter().enumerate().map(lane).collect::<Result<Vec<Lane>, Status>>()
    });
    let mut lanes = checked.await??;
    lanes.iter_mut().for_each(|lane| lane.request.trace = trace.clone());
    lanes.iter().try_for_each(|lane| access.new_tokens(lane.request.canvas.holes()))?;
    let lanes = stream::iter(lanes);
    if racing {
        let lanes: Vec<CompareStream> = lanes.map(|lane| Box::pin(lane.events()) as CompareStream).collect().await;
        return Ok(Box::pin(stream::select_all(lanes)));
    }
    Ok(Box::pin(lanes.flat_map(Lane::events)))
}

/// What errors call a lane.
fn whose(at: usize, lane: &proto::Lane) -> String {
    if lane.name.is_empty() { format!("lane {at}") } else { format!("lane {at} ({})", lane.name) }
}

fn kind(lane: &proto::Lane) -> Option<MethodKind> {
    lane.method.as_ref().map(|method| match method {
        proto::lane::Method::Diffusion(_) => MethodKind::Diffusion,
        proto::lane::Method::Autoregressive(_) => MethodKind::Autoregressive,
    })
}

/// The model asked for, else the first that can do the method.
fn model(registry: &Registry, at: usize, lane: &proto::Lane) -> Result<Served, Status> {
    if lane.name.len() > NAME_BYTES_MAX {
        return Err(bad_field(&format!("lanes[{at}].name"), format!("it has more than {NAME_BYTES_MAX} bytes")));
    }
    let able = |kind| registry.all().into_iter().find(|model| unsupported(&model.info, kind).is_none());
    let able = kind(lane).filter(|_| lane.model.is_empty()).and_then(able);
    let found = able.map_or_else(|| registry.find(&lane.model), Ok);
    found.map_err(|refused| status::within(&refused, &whose(at, lane), str::to_owned))
}

/// One lane's request, as the engine will run it.
fn checked(
    request: &CompareRequest,
    at: usize,
    model: Served,
    id: &str,
    seed: u64,
    deadline: Instant,
    judge: &Arc<Judge>,
) -> Result<Lane, Status> {
    let started = Instant::now();
    let lane = &request.lanes[at];
    let common = request.sampling.clone().unwrap_or_default();
    let asked = GenerateRequest {
        prompt: request.prompt.clone().map(prompt),
        sampling: Some(merged(lane.sampling.clone().unwrap_or_default(), common, seed)),
        method: lane.method.map(|method| match method {
            proto::lane::Method::Diffusion(asked) => generate_request::Method::Diffusion(asked),
            proto::lane::Method::Autoregressive(asked) => generate_request::Method::Autoregressive(asked),
        }),
        stopping: request.stopping.clone(),
        step_events: request.step_events,
        ..GenerateRequest::default()
    };
    let autoregressive = kind(lane) == Some(MethodKind::Autoregressive);
    let options = convert::options(&model.info, asked, format!("{id}.{at}"), deadline);
    let valid = options.and_then(|options| {
        validate(&model.info, options)
            .map_err(|invalid| status::invalid(invalid, |field| convert::path(field, false, autoregressive)))
    });
    let mut valid = valid.map_err(|refused| status::within(&refused, &whose(at, lane), |field| path(field, at, lane)))?;
    valid.fresh = true;
    let name = if lane.name.is_empty() { model.info.name.clone() } else { lane.name.clone() };
    Ok(Lane { index: at as u32, name, model, request: valid, preparing: started.elapsed(), judge: judge.clone() })
}

fn prompt(prompt: compare_request::Prompt) -> generate_request::Prompt {
    match prompt {
        compare_request::Prompt::Text(text) => generate_request::Prompt::Text(text),
        compare_request::Prompt::Chat(chat) => generate_request::Prompt::Chat(chat),
        compare_request::Prompt::TokenIds(ids) => generate_request::Prompt::TokenIds(ids),
    }
}

/// A lane's settings, before those of all lanes, before `seed`.
fn merged(own: proto::Sampling, common: proto::Sampling, seed: u64) -> proto::Sampling {
    proto::Sampling {
        temperature: own.temperature.or(common.temperature),
        top_p: own.top_p.or(common.top_p),
        top_k: own.top_k.or(common.top_k),
        min_p: own.min_p.or(common.min_p),
        repetition_penalty: own.repetition_penalty.or(common.repetition_penalty),
        presence_penalty: own.presence_penalty.or(common.presence_penalty),
        frequency_penalty: own.frequency_penalty.or(common.frequency_penalty),
        logit_bias: if own.logit_bias.is_empty() { common.logit_bias } else { own.logit_bias },
        seed: own.seed.or(common.seed).or(Some(seed)),
        logprobs: own.logprobs.or(common.logprobs),
    }
}

/// Where a field of a lane's request stands in the comparison's.
fn path(field: &str, at: usize, lane: &proto::Lane) -> String {
    let own = match field.split_once('.') {
        Some(("sampling", name)) => lane.sampling.as_ref().is_some_and(|own| sets(own, name)),
        Some(("diffusion" | "autoregressive", _)) => true,
        _ => matches!(field, "diffusion" | "autoregressive"),
    };
    if own { format!("lanes[{at}].{field}") } else { field.into() }
}

fn sets(own: &proto::Sampling, name: &str) -> bool {
    match name {
        "temperature" => own.temperature.is_some(),
        "top_p" => own.top_p.is_some(),
        "top_k" => own.top_k.is_some(),
        "min_p" => own.min_p.is_some(),
        "repetition_penalty" => own.repetition_penalty.is_some(),
        "presence_penalty" => own.presence_penalty.is_some(),
        "frequency_penalty" => own.frequency_penalty.is_some(),
        "logit_bias" => !own.logit_bias.is_empty(),
        "seed" => own.seed.is_some(),
        "logprobs" => own.logprobs.is_some(),
        _ => false,
    }
}
