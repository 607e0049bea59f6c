//! Window assignment and the watermark: pure. The semantics are Spark's.
//!
//! Times are microseconds since the epoch, watermarks milliseconds, as in Spark.
