//! The typed configuration, and sweep files read with line and column.
