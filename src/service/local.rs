//! The service without a network: the same comparisons, for callers in this process.

use std::sync::Arc;
use std::time::Instant;

use tonic::Status;

use super::access::Access;
use super::compare::{CompareStream, compare};
use super::models::describe;
use super::proto::{self, CompareRequest};
use super::registry::Registry;
use super::{ServeError, ServeOptions, Served, convert, lifecycle};
use crate::telemetry::Trace;

/// Models at hand.
pub struct Local(Arc<Registry>);

impl Local {
    /// The first model is the default one.
    pub fn new(models: Vec<Served>) -> Result<Self, ServeError> {
        Ok(Self(Arc::new(Registry::new(models, &ServeOptions::default())?)))
    }

    /// As `Models.List` describes them.
    pub fn models(&self) -> Vec<proto::Model> {
        self.0.all().iter().map(describe).collect()
    }

    /// Runs one step of every model, so that nobody's first one pays for what later ones find ready.
    pub async fn warm(&self) -> Result<(), String> {
        for model in &self.0.all() {
            lifecycle::warm_one(model).await.map_err(|reason| format!("model {}: {reason}", model.info.name))?;
        }
        Ok(())
    }

    /// As `Generation.Compare`.
    pub async fn compare(&self, request: CompareRequest, deadline: Instant) -> Result<CompareStream, Status> {
        let id = convert::request_id(request.request_id.as_deref())?;
        compare(&self.0, request, id, deadline, Trace::default(), &Access::default()).await
    }

    /// For the end of a process.
    pub fn rest(self) {
        self.0.rest();
    }
}
