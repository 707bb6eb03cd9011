//! What a measurement ran on, so that results of different machines are not taken for results of different settings.

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor as it names itself.
    pub cpu: String,
    /// That this process may use.
    pub cores: usize,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = told.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let cpu = name.map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.trim().to_owned());
        Self { cpu, cores: std::thread::available_parallelism().map_or(1, usize::from) }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}, {} cores", self.cpu, self.cores)
    }
}
