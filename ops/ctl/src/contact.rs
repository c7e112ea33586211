//! One run's connection, and which namespace is meant.

use std::path::PathBuf;
use std::time::Duration;

use kvkeep_client::{Call, Client, ClientConfig, Lost, Namespace, Sessions, wire};
use kvkeep_core::Handle;
use kvkeep_core::ids::{NamespaceId, Revision};

use crate::args::Connection;
use crate::failure::{Failure, Outcome};

/// The endpoint that was named; an empty one (an empty environment variable) names none.
pub fn endpoint(connection: &Connection) -> &str {
    match connection.endpoint.as_str() {
        "" => kvkeep_client::config::DEFAULT_ENDPOINT,
        named => named,
    }
}

/// A node that said hello.
pub struct Contact {
    pub client: Client,
    pub call: Call,
}

impl Contact {
    /// Connects.
    pub async fn open(connection: &Connection) -> Outcome<Self> {
        let deadline = Duration::from_millis(connection.timeout_ms);
        let config = ClientConfig {
            lost: Lost::Errors,
            endpoint: endpoint(connection).to_owned(),
            token: connection.token.as_ref().map(|t| t.0.clone()).filter(|t| !t.is_empty()),
            ca_file: connection.ca.as_ref().filter(|f| !f.is_empty()).map(PathBuf::from),
            name: concat!("kvkeepctl/", env!("CARGO_PKG_VERSION")).to_owned(),
            deadline,
            ..ClientConfig::default()
        };
        Ok(Self { client: Client::connect(config).await?, call: Call::default() })
    }

    /// All namespaces.
    pub async fn namespaces(&self) -> Outcome<Vec<wire::NamespaceInfo>> {
        Ok(self.client.admin().namespaces(&self.call).await?)
    }

    /// The one that is meant: by name, tenant/name or number; the only one where none is named.
    pub async fn namespace(&self, name: Option<&str>) -> Outcome<wire::NamespaceInfo> {
        pick(self.namespaces().await?, name)
    }

    /// The same, and its sessions.
    pub async fn sessions(&self, name: Option<&str>) -> Outcome<(wire::NamespaceInfo, Sessions)> {
        let info = self.namespace(name).await?;
        let handle = Handle { namespace: NamespaceId(info.namespace_id), revision: Revision(info.revision) };
        Ok((info, self.client.attach(handle).sessions()))
    }

    /// The same, ready for the block verbs.
    pub async fn blocks(&self, name: Option<&str>) -> Outcome<Namespace> {
        let info = self.namespace(name).await?;
        Ok(self.client.attach(Handle { namespace: NamespaceId(info.namespace_id), revision: Revision(info.revision) }))
    }
}

/// Names of the store's own namespaces begin so: it answers nobody who asks for them.
const SYSTEM_PREFIX: &str = "system/";

fn pick(mut all: Vec<wire::NamespaceInfo>, name: Option<&str>) -> Outcome<wire::NamespaceInfo> {
    all.retain(|n| !n.name.starts_with(SYSTEM_PREFIX));
    let label = |n: &wire::NamespaceInfo| format!("{}/{} ({})", n.tenant, n.name, n.namespace_id);
    let names = all.iter().map(label).collect::<Vec<_>>().join(", ");
    let mut found: Vec<_> = match name {
        None => all,
        Some(name) => {
            let mut by_name: Vec<_> =
                all.iter().filter(|n| n.name == name || format!("{}/{}", n.tenant, n.name) == name).cloned().collect();
            if by_name.is_empty() {
                by_name = all.into_iter().filter(|n| n.namespace_id.to_string() == name).collect();
            }
            by_name
        }
    };
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (Some(_), false) => Err(Failure::usage("more than one namespace is meant; say which with --namespace")
            .advise(format!("there are: {names}"))),
        (None, _) if names.is_empty() => {
            Err(Failure::failed("the node has no namespace yet; engines make theirs when they start"))
        }
        (None, _) => {
            Err(Failure::failed(format!("no namespace {}", name.unwrap_or_default()))
                .advise(format!("there are: {names}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<wire::NamespaceInfo> {
        [(1, "a", "llama"), (2, "b", "llama"), (3, "a", "1")]
            .map(|(namespace_id, tenant, name)| wire::NamespaceInfo {
                namespace_id,
                tenant: tenant.into(),
                name: name.into(),
                ..Default::default()
            })
            .to_vec()
    }

    #[test]
    fn a_namespace_is_meant_by_name_then_by_number() {
        assert_eq!(pick(all(), Some("b/llama")).unwrap().namespace_id, 2);
        assert_eq!(pick(all(), Some("2")).unwrap().namespace_id, 2);
        assert_eq!(pick(all(), Some("1")).unwrap().namespace_id, 3, "a name wins over a number");
        assert_eq!(pick(all(), Some("llama")).unwrap_err().code(), 2);
        assert_eq!(pick(all(), Some("x")).unwrap_err().code(), 1);
        assert_eq!(pick(all(), None).unwrap_err().code(), 2);
        assert_eq!(pick(all()[..1].to_vec(), None).unwrap().namespace_id, 1);
        let system = wire::NamespaceInfo { namespace_id: 4, name: "system/sessions".into(), ..Default::default() };
        let one = vec![all()[0].clone(), system];
        assert_eq!(pick(one.clone(), None).unwrap().namespace_id, 1, "the store's own are never meant");
        assert_eq!(pick(one, Some("4")).unwrap_err().code(), 1);
        assert_eq!(pick(Vec::new(), None).unwrap_err().code(), 1);
    }
}
