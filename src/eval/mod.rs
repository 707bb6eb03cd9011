//! Whether generated text is right, and how fast it came: tasks, the execution of generated code, and measurements.

pub mod distance;
pub mod likelihood;
pub mod load;
pub mod nano;
pub mod problems;
pub mod record;
pub mod sandbox;
pub mod score;
pub mod speculate;
pub mod step;
pub mod suite;
pub mod task;
