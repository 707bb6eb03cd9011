//! HTTP as its clients see it: a real server on a free port with the models that ship, spoken to in HTTP/1.1, and by the clients that
//! OpenAI publishes.
//!
//! Nothing here sleeps to wait for something to happen: tests wait for events, or look again and again within a bound.

mod cancel;
mod client;
mod diffusing;
mod drain;
mod errors;
mod fim;
mod grpc_web;
#[path = "../service/harness.rs"]
#[allow(dead_code, reason = "shared with the tests of gRPC")]
mod harness;
mod official;
mod same;
mod settings;
mod shapes;
mod site;
