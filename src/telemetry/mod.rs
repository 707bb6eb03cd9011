//! What the server tells of itself: metrics for Prometheus, spans for an OpenTelemetry collector, and one line of log for each call.
//!
//! [`calls`] stands at the rim of both ports and opens an [`account`] for every call; [`meter`] is what an engine counts into; [`metrics`] gathers
//! both and writes them out; [`trace`] makes spans and sends them. Nothing here is global but the count of panics: two servers in one
//! process have figures of their own. It knows no tensors, and no prompt: what is recorded are names, numbers and times.

pub mod account;
pub mod calls;
pub mod meter;
pub mod metrics;
pub mod panics;
pub mod trace;

use std::sync::Arc;

pub use account::{Account, Outcome};
pub use calls::{Calls, Watched};
pub use metrics::Metrics;
pub use trace::{Trace, Tracing};

/// Where a server's figures and spans go. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    pub metrics: Arc<Metrics>,
    /// Spans are made only where there is a collector for them.
    pub tracing: Option<Tracing>,
}
