//! How values of the configuration are written where serde's own form does not fit.

/// An address to listen on as text, which cannot be the name of a host.
pub(super) mod address {
    use std::net::SocketAddr;

    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::{Serialize, Serializer};

    pub(in crate::config) fn serialize<S: Serializer>(address: &SocketAddr, serializer: S) -> Result<S::Ok, S::Error> {
        address.serialize(serializer)
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|_| D::Error::custom("this is no IP address with a port, such as 127.0.0.1:8082"))
    }
}

/// An optional value that is written as text, where the empty text means "not set".
pub(super) mod blank {
    use serde::de::value::StringDeserializer;
    use serde::de::{Deserialize, Deserializer, IntoDeserializer};
    use serde::ser::{Serialize, Serializer};

    pub(in crate::config) fn serialize<T: Serialize, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => value.serialize(serializer),
            None => serializer.serialize_str(""),
        }
    }

    pub(in crate::config) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(None);
        }
        let text: StringDeserializer<D::Error> = text.into_deserializer();
        T::deserialize(text).map(Some)
    }
}

/// Networks as text; a single address stands for itself.
pub(super) mod networks {
    use std::net::IpAddr;

    use ipnet::IpNet;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(in crate::config) fn serialize<S: Serializer>(networks: &[IpNet], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(networks.iter().map(ToString::to_string))
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
        Vec::<String>::deserialize(deserializer)?
            .iter()
            .map(|text| {
                text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map_err(|_| {
                    D::Error::custom(format_args!("{text:?} is no network such as 127.0.0.0/8 and no address"))
                })
            })
            .collect()
    }
}
