//! How good a lane's text is: its likelihood under a causal model among those served, and what it has in common with a reference.

use std::sync::Arc;
use std::time::Instant;

use tonic::Status;

use crate::engine::request::{MethodKind, Prompt, unsupported};
use crate::engine::scoring::{self, Likelihood, ScoreOptions};
use crate::engine::{Event, Failure};
use crate::eval::distance::levenshtein;
use crate::service::access::Access;
use crate::service::proto::{self, CompareRequest, ReferenceMatch};
use crate::service::registry::Registry;
use crate::service::{Served, convert, status};

/// What all lanes of a comparison are judged by.
pub struct Judge {
    registry: Arc<Registry>,
    model: Option<Served>,
    prompt: Prompt,
    reference: Option<String>,
    deadline: Instant,
    id: String,
}

impl Judge {
    /// Refuses a judge who is not there or cannot judge.
    pub fn new(
        registry: &Arc<Registry>,
        request: &CompareRequest,
        id: &str,
        deadline: Instant,
        access: &Access,
    ) -> Result<Self, Status> {
        let able = |model: &Served| {
            unsupported(&model.info, MethodKind::Autoregressive).is_none() && access.model(&model.info.name).is_ok()
        };
        let model = match request.judge.as_deref() {
            None => registry.all().into_iter().find(able),
            Some("") => None,
            Some(name) => {
                let found = registry.find(name).map_err(|refused| status::within(&refused, "judge", str::to_owned))?;
                access.model(&found.info.name)?;
                if let Some(reason) = unsupported(&found.info, MethodKind::Autoregressive) {
                    return Err(status::unable(format!("judge: model {name} cannot judge a text: {reason}")));
                }
                Some(found)
            }
        };
        let prompt = match request.prompt.clone() {
            Some(prompt) => convert::prompt(super::prompt(prompt)),
            None => return Err(status::bad_field("prompt", "set one of text, chat and token_ids")),
        };
        let (registry, reference) = (registry.clone(), request.reference.clone());
        Ok(Self { registry, model, prompt, reference, deadline, id: id.into() })
    }

    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// How probable the text of a lane is behind the prompt; `None` where nobody judges.
    pub async fn likelihood(&self, text: &str, lane: u32) -> Result<Option<proto::Likelihood>, Status> {
        let Some(model) = &self.model else { return Ok(None) };
        // An empty text is certain to come about, and no request.
        let found = if text.is_empty() { Likelihood::default() } else { self.score(model, text, lane).await? };
        Ok(Some(proto::Likelihood {
            model: model.info.name.clone(),
            tokens: found.tokens as u64,
            negative_log_likelihood: found.negative_log,
            negative_log_likelihood_per_token: found.per_token(),
        }))
    }

    async fn score(&self, model: &Served, text: &str, lane: u32) -> Result<Likelihood, Status> {
        let id = format!("{}.{lane}.judge", self.id);
        let options = ScoreOptions {
            id: id.clone(),
            prompt: self.prompt.clone(),
            text: Prompt::Text(text.into()),
            deadline: Some(self.deadline),
        };
        let info = model.info.clone();
        let checked = self.registry.off_thread(move || scoring::validate(&info, options)).await?;
        let request = checked.map_err(|invalid| status::invalid(invalid, str::to_owned))?;
        let mut events = model.engine.submit(request).map_err(|refused| status::refused(&refused))?;
        let mut found = Likelihood::default();
        loop {
            match tokio::time::timeout_at(self.deadline.into(), events.recv()).await {
                Ok(Some(Ok(event))) => {
                    found.take(&event);
                    if let Event::Finished { .. } = event {
                        return Ok(found);
                    }
                }
                Ok(Some(Err(failure))) => return Err(status::failure(&failure, &id)),
                Ok(None) => return Err(status::fault("the engine let go of a request without a word", Some(&id))),
                Err(_) => return Err(status::failure(&Failure::DeadlineExceeded, &id)),
            }
        }
    }

    /// What the text has in common with the reference, where there is one.
    pub async fn reference_match(&self, text: &str) -> Result<Option<ReferenceMatch>, Status> {
        let Some(reference) = self.reference.clone() else { return Ok(None) };
        let text = text.to_owned();
        self.registry.off_thread(move || Some(reference_match(&text, &reference))).await
    }
}

fn reference_match(text: &str, reference: &str) -> ReferenceMatch {
    let (text, reference) = (text.trim(), reference.trim());
    let distance = levenshtein(text, reference);
    let longer = text.chars().count().max(reference.chars().count());
    ReferenceMatch {
        exact: text == reference,
        edit_distance: distance as u64,
        normalized_edit_distance: if longer > 0 { distance as f64 / longer as f64 } else { 0.0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_compared_without_the_white_space_around_it() {
        let found = reference_match("    return 1\n", "return 1");
        assert_eq!((found.exact, found.edit_distance, found.normalized_edit_distance), (true, 0, 0.0));
        let found = reference_match("abcd", "abXdef");
        assert_eq!((found.exact, found.edit_distance), (false, 3));
        assert!((found.normalized_edit_distance - 0.5).abs() < 1e-12);
        assert_eq!(reference_match(" ", "").normalized_edit_distance, 0.0);
    }
}
