// Command readme is the example of the README.
package main

import (
	"context"
	"log"
	"os"
	"os/signal"

	"github.com/libdispatcher/dispatcher"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()

	filter := dispatcher.File("filter.o", dispatcher.LoadOptions{})
	link, err := dispatcher.Attach(ctx, dispatcher.XDP("eth0"), filter, dispatcher.Options{Name: "filter"})
	if err != nil {
		log.Fatal(err)
	}
	defer link.Close() // filter leaves; the others on eth0 stay

	<-ctx.Done()
}
