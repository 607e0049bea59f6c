//! SQL filter and derived columns, by DataFusion's expressions.
