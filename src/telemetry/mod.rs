//! Every metric, the logs, the HTTP server.
