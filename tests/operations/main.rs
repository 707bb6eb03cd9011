//! A server as its operators meet it: the real binary with its files, its environment and its signals, on the models that ship.
//!
//! Nothing here sleeps to wait for something to happen: tests wait for a line of the log, or look again and again within a bound.

mod certificates;
mod configuration;
mod models;
mod server;
mod tls;
mod tokens;
