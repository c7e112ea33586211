//! The wire of KVKeep: messages and services of `kvkeep/v1`, generated. No logic lives here.
//!
//! `types.proto` has the words, `blocks.proto` the verbs of both wires and the gRPC service, `sessions.proto` sessions,
//! `wire.proto` the envelope of the block protocol, `admin.proto` what operators ask.

/// Version 1 of the wire.
#[allow(
    missing_docs,
    clippy::doc_markdown,
    clippy::large_enum_variant,
    reason = "generated; the .proto files are documented"
)]
pub mod v1 {
    tonic::include_proto!("kvkeep.v1");

    /// Encoded `FileDescriptorSet` of this package, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kvkeep_v1.bin"));
}

/// Major version of the wire. Any client of the same major version works.
pub const PROTOCOL_MAJOR: u32 = 1;
/// Minor version of the wire.
pub const PROTOCOL_MINOR: u32 = 0;
/// Metadata key under which a failed gRPC call carries its encoded `v1::ErrorDetail`.
pub const ERROR_DETAIL_KEY: &str = "kvkeep-error-bin";
