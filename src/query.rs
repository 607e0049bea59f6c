//! StreamingQuery: recover, plan, run a batch.
