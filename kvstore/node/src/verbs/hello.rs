//! Hello: who is on a connection, and what this server is and allows.

use std::sync::Arc;

use kvkeep_client::convert;
use kvkeep_core::{Error, ErrorKind};
use kvkeep_proto::{PROTOCOL_MAJOR, PROTOCOL_MINOR, v1};

use super::{Answer, Verbs};
use crate::connection::{Connection, Hello, Via};
use crate::failpoint;

impl Verbs {
    /// Answers a hello. `bearer`: a token that came beside the message.
    pub fn hello(
        &self,
        connection: &Connection,
        said: v1::HelloRequest,
        bearer: Option<String>,
    ) -> Answer<v1::HelloReply> {
        if said.major != PROTOCOL_MAJOR {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "this server speaks another major version of the protocol",
            )
            .with("client", said.major)
            .with("server", PROTOCOL_MAJOR)
            .into());
        }
        let instance = convert::instance_from_proto(&said.instance_id)?;
        let token = if said.token.is_empty() { bearer.unwrap_or_default() } else { said.token };
        let identity =
            self.store.identify(connection.via, &token).inspect_err(|_| self.store.counters.denied_calls.one())?;
        let tenant = self.store.tenant(&identity.tenant)?;
        let tenant_name: Arc<str> = identity.tenant.as_str().into();
        let hello = Hello { instance, tenant, tenant_name: Arc::clone(&tenant_name), admin: identity.admin };
        if !connection.say_hello(hello) {
            return Err(Error::new(
                ErrorKind::Conflict,
                "this connection or this instance has said hello as somebody else; open another (gRPC channels of one process may share one: grpc.use_local_subchannel_pool), or draw another instance id",
            )
            .into());
        }
        let via = match connection.via {
            Via::Tcp(peer) => peer.to_string(),
            Via::Unix { uid, .. } => format!("unix uid {uid}"),
        };
        tracing::debug!(client = %said.client, %instance, tenant = %tenant_name, %via, "hello");
        failpoint::at("hello.said");
        let ways = self.store.ways.get();
        Ok(v1::HelloReply {
            major: PROTOCOL_MAJOR,
            minor: PROTOCOL_MINOR,
            features: vec!["blocks".into()],
            server: concat!("kvkeepd ", env!("CARGO_PKG_VERSION")).into(),
            server_epoch: self.store.epoch,
            limits: Some(self.limits()),
            tenant: tenant_name.to_string(),
            node: self.store.config.node_name.clone(),
            block_port: ways.map_or(0, |w| u32::from(w.block_port)),
            unix_socket: ways.map(|w| w.unix_socket.clone()).unwrap_or_default(),
            may_map: connection.via.may_map(&self.store.config.auth),
            may_register: matches!(connection.via, Via::Unix { .. }),
        })
    }

    fn limits(&self) -> v1::Limits {
        let l = &self.store.config.limits;
        v1::Limits {
            batch_keys_max: l.batch_keys_max,
            match_queries_max: l.match_queries_max,
            block_bytes_max: l.block_bytes_max.0,
            chunk_bytes_max: l.chunk_bytes_max,
            reserve_bytes_max: l.reserve_bytes_max.0,
            leases_per_instance_max: l.leases_per_instance_max,
            leased_positions_per_instance_max: l.leased_positions_per_instance_max,
            lease_ttl_ms_max: l.lease_ttl_ms_max,
            lease_life_ms_max: l.lease_life_ms_max,
            deadline_ms_max: l.deadline_ms_max,
            reservation_ms: l.reservation_ms,
            region_bytes_max: l.region_bytes_max.0,
            regions_max: l.regions_max,
            runs_max: l.runs_max,
            mapped_bytes_max: l.mapped_bytes_max.0,
            calls_per_connection_max: l.calls_per_connection_max,
            envelope_bytes_max: l.envelope_bytes_max,
        }
    }
}
