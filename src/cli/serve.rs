//! `lacuna serve`: loads a model and puts it on gRPC.

use std::net::SocketAddr;

use anyhow::{Result, bail};
use clap::Args;

use super::load::ModelOptions;

#[derive(Args, Debug)]
pub struct Options {
    #[command(flatten)]
    pub model: ModelOptions,
    /// Where to listen; port 0 takes a free one and logs it
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    pub address: SocketAddr,
    /// Sequences decoded together
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub max_resident: usize,
    /// Requests that may wait; one more is refused
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub queue: usize,
    /// How long running requests may go on once the server is told to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_seconds: u64,
}

pub fn run(_options: Options) -> Result<()> {
    bail!("the server is not here yet")
}
