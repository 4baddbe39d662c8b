//! A small blocking NBD client of the tests' own: it sends what a test says, also what no client should.

use std::io::{self, Read, Write};
use std::net::TcpStream;

const GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_ERROR: u32 = 1 << 31;
const WRITE: u16 = 1;
const TRIM: u16 = 4;

/// One connection in the transmission phase, with simple replies.
pub struct Nbd {
    stream: TcpStream,
    cookie: u64,
}

impl Nbd {
    /// Connects to `nbd://host:port/export`.
    pub fn connect(uri: &str) -> Self {
        Self::try_connect(uri).unwrap_or_else(|error| panic!("{uri}: {error}"))
    }

    pub fn try_connect(uri: &str) -> io::Result<Self> {
        let (address, export) = uri.strip_prefix("nbd://").unwrap().split_once('/').unwrap();
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(crate::rig::DEADLINE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        stream.write_all(&3_u32.to_be_bytes())?;
        let mut data = u32::try_from(export.len()).unwrap().to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&[0, 0]);
        let mut option = b"IHAVEOPT".to_vec();
        option.extend_from_slice(&GO.to_be_bytes());
        option.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        option.extend_from_slice(&data);
        stream.write_all(&option)?;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut body = vec![0; u32::from_be_bytes(head[16..20].try_into().unwrap()) as usize];
            stream.read_exact(&mut body)?;
            if kind & REPLY_ERROR != 0 {
                return Err(io::Error::other(format!("{kind:#x} {}", String::from_utf8_lossy(&body))));
            }
            if kind == REPLY_ACK {
                return Ok(Self { stream, cookie: 0 });
            }
        }
    }

    fn send_header(&mut self, command: u16, offset: u64, length: usize) -> io::Result<()> {
        self.cookie += 1;
        let mut header = 0x2560_9513_u32.to_be_bytes().to_vec();
        header.extend_from_slice(&[0, 0]);
        header.extend_from_slice(&command.to_be_bytes());
        header.extend_from_slice(&self.cookie.to_be_bytes());
        header.extend_from_slice(&offset.to_be_bytes());
        header.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
        self.stream.write_all(&header)
    }

    /// How the server sees this end.
    pub fn local_address(&self) -> String {
        self.stream.local_addr().unwrap().to_string()
    }

    /// Writes, and returns the server's error by its number.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.send_header(WRITE, offset, data.len())?;
        self.stream.write_all(data)?;
        self.reply()
    }

    /// Discards, and returns the server's error by its number.
    pub fn trim(&mut self, offset: u64, length: usize) -> io::Result<()> {
        self.send_header(TRIM, offset, length)?;
        self.reply()
    }

    fn reply(&mut self) -> io::Result<()> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        match u32::from_be_bytes(reply[4..8].try_into().unwrap()) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error as i32)),
        }
    }

    /// Announces a write, sends a part of its payload, and no more.
    pub fn stop_in_a_write(&mut self, offset: u64, announced: usize, sent: usize) {
        self.send_header(WRITE, offset, announced).unwrap();
        self.stream.write_all(&vec![7; sent]).unwrap();
    }

    /// Announces a write, sends a part of its payload, and is gone.
    pub fn break_off_in_a_write(mut self, offset: u64, announced: usize, sent: usize) {
        self.stop_in_a_write(offset, announced, sent);
    }
}
