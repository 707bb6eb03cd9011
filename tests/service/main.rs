//! The service as its clients see it: a real server on a free port, spoken to in the protocol.
//!
//! Nothing here sleeps to wait for something to happen: tests wait for events, or look again and again within a bound.

mod autoregressive;
mod commits;
mod compare;
mod determinism;
mod drain;
mod engine_time;
mod harness;
mod infill;
mod information;
mod invalid;
mod load;
mod python;
mod queue;
mod settings;
mod unreadable;
