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
        Self { cpu: crate::tensor::cpu_name(), cores: std::thread::available_parallelism().map_or(1, usize::from) }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}, {} cores", self.cpu, self.cores)
    }
}
