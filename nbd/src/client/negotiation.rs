//! The handshake, seen from the client: one call per option, then [`Negotiation::go`] turns it into a [`Client`].

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, join, split};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::rustls::pki_types::ServerName;

use super::{Client, ClientError, Transport};
use crate::tls::ClientTls;
use crate::transmission::Mode;
use crate::wire::option::{
    BlockSizes, ExportInfo, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME, InfoRequest, MetaRequest,
    OPTION_REPLY_LENGTH, OptionCode, OptionReplyHeader, ReplyType, WantedInfo, encode_option,
};
use crate::wire::{
    FIXED_NEWSTYLE, Fields, IHAVEOPT, MAX_STRING, NBDMAGIC, NO_ZEROES, OLDSTYLE, SIZE_LIMIT, string, truncated,
};

/// Longest option reply taken, in bytes: a name and a description of full length fit.
const MAX_REPLY: u32 = 16 << 10;
/// Most replies to one option: a server with more exports than this is not one to back up from.
const MAX_REPLIES: usize = 16 << 10;

type Result<T, E = ClientError> = std::result::Result<T, E>;

/// A connection in the handshake.
pub struct Negotiation {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    handshake_flags: u16,
    mode: Mode,
    contexts: Vec<MetaContext>,
}

/// One export of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// The name.
    pub name: String,
    /// One line for humans; may be empty.
    pub description: String,
}

/// What a server says of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportDetails {
    /// Size in bytes, below 2^63, and flags.
    pub info: ExportInfo,
    /// The canonical name, if the server told.
    pub name: Option<String>,
    /// One line for humans, if the server told.
    pub description: Option<String>,
    /// Size constraints, if the server told.
    pub block_sizes: Option<BlockSizes>,
}

/// A metadata context as the server calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// Its id in replies to BLOCK_STATUS; 0 in a list.
    pub id: u32,
    /// `namespace:leaf`.
    pub name: String,
}

impl Negotiation {
    /// Connects and greets.
    pub async fn connect(transport: &Transport) -> Result<Self> {
        match transport {
            Transport::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                let (reader, writer) = stream.into_split();
                Self::begin(reader, writer).await
            }
            Transport::Unix(path) => {
                let (reader, writer) = UnixStream::connect(path).await?.into_split();
                Self::begin(reader, writer).await
            }
        }
    }

    /// Greets over a stream that is already there.
    pub async fn over<S: AsyncRead + AsyncWrite + Send + 'static>(stream: S) -> Result<Self> {
        let (reader, writer) = split(stream);
        Self::begin(reader, writer).await
    }

    /// Greets over the two halves of a stream.
    pub async fn begin(
        reader: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self> {
        let (mut reader, mut writer) = (Box::new(reader), Box::new(writer));
        if reader.read_u64().await? != NBDMAGIC {
            return Err(ClientError::Protocol("it does not greet like an NBD server"));
        }
        match reader.read_u64().await? {
            IHAVEOPT => {}
            OLDSTYLE => return Err(ClientError::Protocol("it speaks the oldstyle handshake only")),
            _ => return Err(ClientError::Protocol("its second magic is unknown")),
        }
        let handshake_flags = reader.read_u16().await?;
        if handshake_flags & FIXED_NEWSTYLE == 0 {
            return Err(ClientError::Protocol("it does not speak fixed newstyle"));
        }
        let client_flags = u32::from(handshake_flags & (FIXED_NEWSTYLE | NO_ZEROES));
        writer.write_u32(client_flags).await?;
        writer.flush().await?;
        Ok(Self { reader, writer, handshake_flags, mode: Mode::Simple, contexts: Vec::new() })
    }

    /// Goes on in TLS with a server that proves to be `name`, a DNS name or an IP address. What was negotiated before is
    /// forgotten on both sides.
    ///
    /// # Errors
    /// The server refuses, or its certificate is wrong, or ours. The connection ends in each case: whoever wants TLS does not go
    /// on without it.
    pub async fn start_tls(mut self, tls: &ClientTls, name: &str) -> Result<Self> {
        let failed = |error| ClientError::TlsHandshake(Arc::new(error));
        let name = ServerName::try_from(name.to_owned()).map_err(|error| failed(std::io::Error::other(error)))?;
        if !self.option(OptionCode::STARTTLS, &[]).await?.is_empty() {
            return Err(ClientError::Protocol("its answer to STARTTLS is not only an ACK"));
        }
        // What a stranger sent in plain text behind the ACK is not skipped: it breaks the handshake.
        let stream = tls.connector().connect(name, join(self.reader, self.writer)).await.map_err(failed)?;
        let (reader, writer) = split(stream);
        let (reader, writer) = (Box::new(reader), Box::new(writer));
        Ok(Self { reader, writer, handshake_flags: self.handshake_flags, mode: Mode::Simple, contexts: Vec::new() })
    }

    /// Asks for structured replies; an error leaves the connection with simple ones.
    pub async fn structured_replies(&mut self) -> Result<()> {
        self.option(OptionCode::STRUCTURED_REPLY, &[]).await?;
        self.mode = Mode::Structured;
        Ok(())
    }

    /// Asks for extended headers; an error leaves the connection as it was.
    pub async fn extended_headers(&mut self) -> Result<()> {
        self.option(OptionCode::EXTENDED_HEADERS, &[]).await?;
        self.mode = Mode::Extended;
        Ok(())
    }

    /// The exports that the server lists.
    pub async fn list(&mut self) -> Result<Vec<ListedExport>> {
        let replies = self.option(OptionCode::LIST, &[]).await?;
        let wrong = ClientError::Protocol("a list reply is not well formed");
        let listed = replies.into_iter().filter(|(reply, _)| *reply == ReplyType::SERVER).map(|(_, data)| {
            let mut fields = Fields(&data);
            let length = fields.u32()?;
            let name = string(fields.bytes(length)?)?.to_owned();
            Some(ListedExport { name, description: string(fields.0)?.to_owned() })
        });
        listed.collect::<Option<_>>().ok_or(wrong)
    }

    /// What the server says of an export, without entering it.
    pub async fn info(&mut self, export: &str) -> Result<ExportDetails> {
        self.information(OptionCode::INFO, export).await
    }

    /// The contexts that the server has for an export; no queries asks for all.
    pub async fn list_meta_contexts(&mut self, export: &str, queries: &[&str]) -> Result<Vec<MetaContext>> {
        self.meta_contexts(OptionCode::LIST_META_CONTEXT, export, queries).await
    }

    /// Selects contexts; tells those that the server has. Needs structured replies.
    pub async fn set_meta_contexts(&mut self, export: &str, queries: &[&str]) -> Result<Vec<MetaContext>> {
        self.contexts.clear();
        let contexts = self.meta_contexts(OptionCode::SET_META_CONTEXT, export, queries).await?;
        self.contexts.clone_from(&contexts);
        Ok(contexts)
    }

    /// Enters an export.
    pub async fn go(self, export: &str) -> Result<Client> {
        self.go_or_stay(export).await?.map_err(|(_, error)| error)
    }

    /// Enters an export; if the server refuses, the handshake is given back to try something else.
    pub async fn go_or_stay(mut self, export: &str) -> Result<Result<Client, (Self, ClientError)>> {
        match self.information(OptionCode::GO, export).await {
            Ok(details) => Ok(Ok(Client::enter(self.reader, self.writer, details, self.mode, self.contexts))),
            Err(error @ ClientError::Refused { .. }) => Ok(Err((self, error))),
            Err(error) => Err(error),
        }
    }

    /// Enters an export the old way, in which a server that refuses can only close.
    pub async fn export_name(mut self, export: &str) -> Result<Client> {
        self.send(OptionCode::EXPORT_NAME, export.as_bytes()).await?;
        let mut bytes = [0; 10];
        self.reader.read_exact(&mut bytes).await?;
        if self.handshake_flags & NO_ZEROES == 0 {
            self.reader.read_exact(&mut [0; 124]).await?;
        }
        let info = ExportInfo::decode(bytes).ok_or(ClientError::Protocol("the answer to EXPORT_NAME is short"))?;
        check_info(info)?;
        let details = ExportDetails { info, name: None, description: None, block_sizes: None };
        Ok(Client::enter(self.reader, self.writer, details, self.mode, self.contexts))
    }

    /// Ends the handshake politely.
    pub async fn abort(mut self) -> Result<()> {
        self.option(OptionCode::ABORT, &[]).await.map(drop)
    }

    /// Any option that is answered like the fixed newstyle ones: the replies before the ACK, or the error.
    pub async fn option(&mut self, option: OptionCode, data: &[u8]) -> Result<Vec<(ReplyType, Vec<u8>)>> {
        self.send(option, data).await?;
        let mut replies = Vec::new();
        loop {
            let mut header = [0; OPTION_REPLY_LENGTH];
            self.reader.read_exact(&mut header).await?;
            let header = OptionReplyHeader::decode(header)
                .ok_or(ClientError::Protocol("the magic of an option reply is wrong"))?;
            if header.code != option {
                return Err(ClientError::Protocol("it answers an option that was not sent"));
            }
            if header.length > MAX_REPLY {
                return Err(ClientError::Protocol("an option reply is too long"));
            }
            let mut payload = vec![0; header.length as usize];
            self.reader.read_exact(&mut payload).await?;
            if header.reply == ReplyType::ACK {
                let empty = payload.is_empty();
                return if empty { Ok(replies) } else { Err(ClientError::Protocol("an ACK carries data")) };
            }
            if header.reply.is_error() {
                let text = String::from_utf8_lossy(&payload);
                let text = truncated(&text, MAX_STRING).to_owned();
                return Err(ClientError::Refused { option, reply: header.reply, text });
            }
            if replies.len() == MAX_REPLIES {
                return Err(ClientError::Protocol("its answers to an option do not end"));
            }
            replies.push((header.reply, payload));
        }
    }

    async fn send(&mut self, option: OptionCode, data: &[u8]) -> Result<()> {
        self.writer.write_all(&encode_option(option, data)).await?;
        Ok(self.writer.flush().await?)
    }

    async fn information(&mut self, option: OptionCode, export: &str) -> Result<ExportDetails> {
        let wanted = WantedInfo { name: true, description: true };
        let replies = self.option(option, &InfoRequest { name: export, wanted }.encode()).await?;
        let (mut info, mut name, mut description, mut block_sizes) = (None, None, None, None);
        for (_, data) in replies.iter().filter(|(reply, _)| *reply == ReplyType::INFO) {
            let wrong = || ClientError::Protocol("an information reply is not well formed");
            let mut fields = Fields(data);
            match fields.u16().ok_or_else(wrong)? {
                INFO_EXPORT => {
                    let bytes = fields.0.try_into().map_err(|_| wrong())?;
                    info = Some(ExportInfo::decode(bytes).ok_or_else(wrong)?);
                }
                INFO_NAME => name = Some(string(fields.0).ok_or_else(wrong)?.to_owned()),
                INFO_DESCRIPTION => description = Some(string(fields.0).ok_or_else(wrong)?.to_owned()),
                INFO_BLOCK_SIZE => block_sizes = Some(BlockSizes::decode(fields).ok_or_else(wrong)?),
                _ => {}
            }
        }
        let info = info.ok_or(ClientError::Protocol("it did not tell the size"))?;
        check_info(info)?;
        if block_sizes.is_some_and(|sizes| !are_sound(sizes)) {
            return Err(ClientError::Protocol("its block sizes make no sense"));
        }
        Ok(ExportDetails { info, name, description, block_sizes })
    }

    async fn meta_contexts(&mut self, option: OptionCode, export: &str, queries: &[&str]) -> Result<Vec<MetaContext>> {
        let replies = self.option(option, &MetaRequest::encode(export, queries)).await?;
        let contexts = replies.into_iter().filter(|(reply, _)| *reply == ReplyType::META_CONTEXT).map(|(_, data)| {
            let mut fields = Fields(&data);
            Some(MetaContext { id: fields.u32()?, name: string(fields.0)?.to_owned() })
        });
        contexts.collect::<Option<_>>().ok_or(ClientError::Protocol("a context reply is not well formed"))
    }
}

impl std::fmt::Debug for Negotiation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Negotiation")
            .field("mode", &self.mode)
            .field("contexts", &self.contexts)
            .finish_non_exhaustive()
    }
}

fn check_info(info: ExportInfo) -> Result<()> {
    use crate::wire::TransmissionFlags;
    if info.size >= SIZE_LIMIT {
        return Err(ClientError::Protocol("the size is not below 2^63"));
    }
    if !info.flags.contains(TransmissionFlags::HAS_FLAGS) {
        return Err(ClientError::Protocol("its transmission flags are not valid"));
    }
    Ok(())
}

fn are_sound(BlockSizes { minimum, preferred, maximum }: BlockSizes) -> bool {
    let fits = minimum <= preferred && preferred <= maximum;
    minimum.is_power_of_two() && minimum <= 65536 && preferred.is_power_of_two() && preferred >= 512 && fits
}
