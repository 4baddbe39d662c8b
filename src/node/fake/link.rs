//! placeholder
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
#[derive(Debug)]
pub(super) struct Link { s: TcpStream, c: u64 }
impl Link {
 pub(super) async fn connect(host: &str, port: u16, export: &str) -> io::Result<Self> {
   let mut s = TcpStream::connect((host, port)).await?;
   let mut b=[0u8;18]; s.read_exact(&mut b).await?;
   s.write_all(&3u32.to_be_bytes()).await?;
   let mut d=vec![]; d.extend((export.len() as u32).to_be_bytes()); d.extend(export.as_bytes()); d.extend(0u16.to_be_bytes());
   let mut o=vec![]; o.extend(b"IHAVEOPT"); o.extend(7u32.to_be_bytes()); o.extend((d.len() as u32).to_be_bytes()); o.extend(d);
   s.write_all(&o).await?;
   loop { let mut h=[0u8;20]; s.read_exact(&mut h).await?;
     let t=u32::from_be_bytes(h[12..16].try_into().map_err(io::Error::other)?); let l=u32::from_be_bytes(h[16..20].try_into().map_err(io::Error::other)?);
     let mut v=vec![0;l as usize]; s.read_exact(&mut v).await?;
     if t==1 {break} if t & 0x8000_0000 != 0 { return Err(io::Error::other(String::from_utf8_lossy(&v).into_owned())); } }
   Ok(Self{s,c:0}) }
 async fn req(&mut self, ty: u16, offset:u64, len:u32, data:&[u8]) -> io::Result<()> {
   self.c+=1; let mut h=vec![]; h.extend(0x2560_9513u32.to_be_bytes()); h.extend(0u16.to_be_bytes()); h.extend(ty.to_be_bytes()); h.extend(self.c.to_be_bytes()); h.extend(offset.to_be_bytes()); h.extend(len.to_be_bytes());
   self.s.write_all(&h).await?; self.s.write_all(data).await?;
   let mut r=[0u8;16]; self.s.read_exact(&mut r).await?;
   let e=u32::from_be_bytes(r[4..8].try_into().map_err(io::Error::other)?); if e!=0 { return Err(io::Error::other(format!("NBD error {e}"))); } Ok(()) }
 pub(super) async fn write(&mut self, offset: u64, data: Vec<u8>) -> io::Result<()> { let l=data.len() as u32; self.req(1,offset,l,&data).await }
 pub(super) async fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> { self.req(6,offset,length as u32,&[]).await }
}
