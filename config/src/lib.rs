//! Sweep files, read with line and column.
//!
//! | module | holds |
//! |---|---|
//! | [`sweep_file`] | a sweep file to a checked spec, with `--set` overrides and resolved paths |
//! | [`contexts`] | servers by name |
//! | [`machines`] | machine types with their prices: those that come with the program, and the user's own |
//! | [`published`] | published numbers to hold beside a sweep's |
//! | [`skypilot`] | SkyPilot's catalogues of the same |
//! | [`size`] | numbers of bytes as people write them |
//! | [`limits`] | how much the sweeps and uploads of a namespace may take |
//! | [`tokens`] | who may call a server, and as what |
//! | [`tasks`] | what models are evaluated on |
//! | `evaluations` | task files into the sweep that names them |
//! | `user` | the files of a user's own |
//! | `yaml` | YAML text to JSON and the place of each key |
//! | `overrides` | `--set key=value` |
//! | `paths` | which values are local paths, and what they resolve to |

pub mod contexts;
mod evaluations;
pub mod limits;
pub mod machines;
mod overrides;
pub mod paths;
pub mod published;
pub mod size;
pub mod skypilot;
pub mod sweep_file;
pub mod tasks;
pub mod tokens;
mod user;
mod yaml;
