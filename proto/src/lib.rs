//! The wire: protobuf definitions, the code generated from them, their conversion to and from domain
//! types, and the one mapping from errors to gRPC statuses. Wire types stay in here and in the gRPC
//! modules of coordinator, agent and command line.

pub mod convert;
pub mod limits;
pub mod status;
pub mod version;

/// Generated from `proto/lorafleet/v1/*.proto`.
#[allow(missing_docs, clippy::all, reason = "generated; the .proto files hold the comments")]
pub mod v1 {
    tonic::include_proto!("lorafleet.v1");
}

/// The encoded `FileDescriptorSet` of all definitions, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The largest piece of a file in a stream, in bytes.
pub const CHUNK_BYTES: usize = 1 << 20;

/// The header of an answer that is told from what was last known: so many seconds ago it was known to be current.
pub const STALE_SECONDS: &str = "lorafleet-stale-seconds";
