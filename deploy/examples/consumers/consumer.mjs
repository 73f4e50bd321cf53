// Prints a line for each OOM kill, and continues where it ended.
import { AckPolicy, jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";

const nc = await connect({
  servers: process.env.NATS_URL, user: "oom-tap", pass: process.env.NATS_PASSWORD, tls: { caFile: process.env.NATS_CA },
  inboxPrefix: "_INBOX_oom-tap", maxReconnectAttempts: -1,
});
const manager = await jetstreamManager(nc, { checkAPI: false }); // the tap may not
const info = await manager.consumers.add("OOM", {
  durable_name: "example-node", filter_subject: "oom.v1.kill.>", ack_policy: AckPolicy.None, // the tap may not ack
});
const consumer = jetstream(nc).consumers.getConsumerFromInfo(info);
for await (const message of await consumer.consume({ max_messages: 1 })) {
  const e = message.json();
  const pod = e.container?.pod_uid ?? "-", container = e.container?.container_id ?? "-";
  console.log(`pod ${pod} container ${container}: ${e.victim.comm}[${e.victim.pid}] was ${e.outcome} on ${e.node.name}, scope ${e.scope}`);
}
