//! Where the server is, and how patient to be with it.

use kvkeep_client as sdk;
use kvkeep_client::block::pool::Wire;
use kvkeep_client::engine::EngineConfig;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::args::seconds;
use crate::error::raise;
use crate::format::Format;
use crate::namespace::Namespace;

/// Configuration; each namespace has connections of its own.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Client(sdk::ClientConfig);

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (
        endpoint = None, *, token = None, ca_file = None, name = None, instance = None, deadline = 10.0, patience = 0.1,
        connect_timeout = 2.0, block_connections = 16, way = "fastest",
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn new(
        endpoint: Option<String>,
        token: Option<String>,
        ca_file: Option<std::path::PathBuf>,
        name: Option<String>,
        instance: Option<&[u8]>,
        deadline: f64,
        patience: f64,
        connect_timeout: f64,
        block_connections: usize,
        way: &str,
    ) -> PyResult<Self> {
        let said = sdk::ClientConfig::from_env();
        let instance = instance
            .map(|id| id.try_into().map_err(|_| PyValueError::new_err("an instance id has 16 bytes")))
            .transpose()?;
        let config = sdk::ClientConfig {
            endpoint: endpoint.unwrap_or(said.endpoint),
            token: token.or(said.token),
            ca_file: ca_file.or(said.ca_file),
            name: name.unwrap_or_else(|| concat!("kvkeep-python/", env!("CARGO_PKG_VERSION")).to_owned()),
            instance: instance.map_or(said.instance, kvkeep_core::InstanceId),
            deadline: seconds(deadline)?,
            patience: seconds(patience)?,
            connect_timeout: seconds(connect_timeout)?,
            block_connections,
            way: match way {
                "fastest" => sdk::WayWish::Fastest,
                "socket" => sdk::WayWish::Only(Wire::Socket),
                "port" => sdk::WayWish::Only(Wire::Port),
                "grpc" => sdk::WayWish::Only(Wire::Grpc),
                _ => return Err(PyValueError::new_err("a way is fastest, socket, port or grpc")),
            },
            ..said
        };
        config.check().map_err(|e| raise(&e))?;
        Ok(Self(config))
    }

    #[getter]
    fn endpoint(&self) -> &str {
        &self.0.endpoint
    }

    #[pyo3(signature = (name, format, revision, *, queues = 1, in_flight_max = 64))]
    fn namespace(
        &self,
        name: &str,
        format: Py<Format>,
        revision: &str,
        queues: usize,
        in_flight_max: usize,
    ) -> PyResult<Namespace> {
        let config = EngineConfig {
            client: self.0.clone(),
            queues,
            in_flight_max,
            ..EngineConfig::new(name, format.get().0.clone(), revision)
        };
        Namespace::open(config, format)
    }

    fn __repr__(&self) -> String {
        format!("Client({:?})", self.0.endpoint)
    }
}
