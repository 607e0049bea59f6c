//! The only user of librdkafka.
