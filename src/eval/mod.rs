//! Whether generated text is right, and how fast it came: tasks, the execution of generated code, comparison, and reports.

pub mod nano;
pub mod sandbox;
