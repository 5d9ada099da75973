//! The wire: protobuf definitions, generated code and its conversion to domain types.
