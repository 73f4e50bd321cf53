"""Prints a line for each OOM kill, and continues where it ended. Without a library, to show the protocol; there is nats-py."""
import json, os, socket, ssl, sys, urllib.parse

url = urllib.parse.urlsplit(os.environ["NATS_URL"])
plain = socket.create_connection((url.hostname, url.port or 4222))
while plain.recv(1) != b"\n": pass  # INFO comes before TLS
sock = ssl.create_default_context(cafile=os.environ["NATS_CA"]).wrap_socket(plain, server_hostname=url.hostname)
stream = sock.makefile("rb")
def publish(subject, body):
    data = json.dumps(body)
    sock.sendall(f"PUB $JS.API.CONSUMER.{subject} _INBOX_oom-tap.py {len(data)}\r\n{data}\r\n".encode())
login = {"user": "oom-tap", "pass": os.environ["NATS_PASSWORD"], "headers": True, "verbose": False, "pedantic": False}
sock.sendall(f"CONNECT {json.dumps(login)}\r\nSUB _INBOX_oom-tap.py 1\r\n".encode())
config = {"durable_name": "example-py", "filter_subject": "oom.v1.kill.>", "ack_policy": "none"}  # the tap may not ack
publish("CREATE.OOM.example-py.oom.v1.kill.>", {"stream_name": "OOM", "config": config})
for verb, *args in map(bytes.split, stream):
    if verb == b"PING": sock.sendall(b"PONG\r\n")
    if verb == b"-ERR": sys.exit(b" ".join(args).decode())
    if verb not in (b"MSG", b"HMSG"): continue
    data = stream.read(int(args[-1]) + 2)[int(args[-2]) if verb == b"HMSG" else 0:]  # without its headers
    if args[0].startswith(b"oom."):
        e = json.loads(data)
        c, v = e.get("container", {}), e["victim"]
        print(f"pod {c.get('pod_uid', '-')} container {c.get('container_id', '-')}: {v.get('comm', '')}[{v['pid']}]"
              f" was {e['outcome']} on {e['node']['name']}, scope {e['scope']}", flush=True)
    elif b'"error"' in data: sys.exit(data.decode())
    publish("MSG.NEXT.OOM.example-py", {"batch": 1, "expires": 30_000_000_000})
