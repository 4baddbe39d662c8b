//! A connection without manners, for tests: any bytes out, whatever comes in.

use tokio::io::{self, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::wire::option::{GREETING_LENGTH, OPTION_REPLY_LENGTH, OptionCode, OptionReplyHeader, encode_option};
use crate::wire::reply::ReplyHeader;
use crate::wire::request::Request;

/// A stream to a server, with the messages of the protocol as units and nothing checked.
#[derive(Debug)]
pub struct Raw<S>(
    /// The stream, for what the methods do not do.
    pub S,
);

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    /// Reads the greeting and sends these client flags.
    pub async fn greet(&mut self, client_flags: u32) -> io::Result<[u8; GREETING_LENGTH]> {
        let mut greeting = [0; GREETING_LENGTH];
        self.0.read_exact(&mut greeting).await?;
        self.0.write_all(&client_flags.to_be_bytes()).await?;
        Ok(greeting)
    }

    /// Sends bytes.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await?;
        self.0.flush().await
    }

    /// Receives exactly so many bytes.
    pub async fn receive(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    /// Receives all that comes until the server closes.
    pub async fn receive_all(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).await?;
        Ok(bytes)
    }

    /// Sends an option whose length is the truth.
    pub async fn option(&mut self, code: OptionCode, data: &[u8]) -> io::Result<()> {
        self.send(&encode_option(code, data)).await
    }

    /// Receives one option reply with its data.
    pub async fn option_reply(&mut self) -> io::Result<(OptionReplyHeader, Vec<u8>)> {
        let mut header = [0; OPTION_REPLY_LENGTH];
        self.0.read_exact(&mut header).await?;
        let header = OptionReplyHeader::decode(header).ok_or(io::ErrorKind::InvalidData)?;
        let data = self.receive(header.length as usize).await?;
        Ok((header, data))
    }

    /// Sends a request header, whatever it says, and these bytes behind it.
    pub async fn request(&mut self, request: Request, payload: &[u8]) -> io::Result<()> {
        self.send(&request.encode_compact().ok_or(io::ErrorKind::InvalidInput)?).await?;
        self.send(payload).await
    }

    /// The same with an extended header.
    pub async fn extended_request(&mut self, request: Request, payload: &[u8]) -> io::Result<()> {
        self.send(&request.encode_extended()).await?;
        self.send(payload).await
    }

    /// Receives the header of a reply, and the payload if it is a chunk.
    pub async fn reply(&mut self) -> io::Result<(ReplyHeader, Vec<u8>)> {
        let magic = self.0.read_u32().await?;
        let length = ReplyHeader::length_for(magic).ok_or(io::ErrorKind::InvalidData)?;
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(self.receive(length - 4).await?);
        let header = ReplyHeader::decode(&bytes).ok_or(io::ErrorKind::InvalidData)?;
        let payload = match header {
            ReplyHeader::Chunk { length, .. } => {
                let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidData)?;
                self.receive(length).await?
            }
            ReplyHeader::Simple { .. } => Vec::new(),
        };
        Ok((header, payload))
    }
}
