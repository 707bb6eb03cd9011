//! What a server tells of itself, on the real binary: figures that add up, spans in a collector, and a log without secrets.

#[path = "../common/process.rs"]
mod process;

mod exposition;
mod logs;
mod metrics;
mod tracing;
