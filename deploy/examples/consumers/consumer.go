package main // prints a line for each OOM kill, and continues where it ended

import (
	"cmp"
	"context"
	"fmt"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/oom-tracer/oom-tracer/go/event"
	"os"
)

func main() {
	login, ca, inbox := nats.UserInfo("oom-tap", os.Getenv("NATS_PASSWORD")), nats.RootCAs(os.Getenv("NATS_CA")), nats.CustomInboxPrefix("_INBOX_oom-tap")
	js := must(jetstream.New(must(nats.Connect(os.Getenv("NATS_URL"), login, ca, inbox, nats.MaxReconnects(-1)))))
	config := jetstream.ConsumerConfig{Durable: "example-go", FilterSubject: "oom.v1.kill.>", AckPolicy: jetstream.AckNonePolicy} // the tap may not ack
	for messages := must(must(js.CreateOrUpdateConsumer(context.Background(), "OOM", config)).Messages(jetstream.PullMaxMessages(1))); ; {
		e := must(event.Parse(must(messages.Next()).Data()))
		c := cmp.Or(e.Container, &event.Container{PodUID: "-", ContainerID: "-"})
		fmt.Printf("pod %s container %s: %s[%d] was %s on %s, scope %s\n", c.PodUID, c.ContainerID, e.Victim.Comm, e.Victim.PID, e.Outcome, e.Node.Name, e.Scope)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
