// The contract's server and client with net/http, and a TCP proxy that is one io.Copy each way.
// copy-header makes small GETs by Read and Write; the rest of a connection is io.Copy, each way.
//
//	httpd serve ADDRESS
//	httpd client URL check|load ...
//	httpd copy|copy-header ADDRESS BACKEND
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	passes  = 3
	lasting = 700 * time.Millisecond
	large   = 1_000_000
)

var patterns sync.Map

func pattern(size int) []byte {
	if made, ok := patterns.Load(size); ok {
		return made.([]byte)
	}
	made := make([]byte, (size+3)/4*4)
	for at := 0; at < len(made); at += 4 {
		binary.BigEndian.PutUint32(made[at:], uint32(at/4))
	}
	patterns.Store(size, made[:size])
	return made[:size]
}

func must[T any](value T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return value
}

func serve(address string) {
	http.HandleFunc("/bytes/", func(w http.ResponseWriter, r *http.Request) {
		size, err := strconv.Atoi(r.URL.Path[len("/bytes/"):])
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(size))
		w.Write(pattern(size))
	})
	http.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body)
	})
	http.HandleFunc("/sink", func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})
	must(0, http.ListenAndServe(address, nil))
}

func body(answer *http.Response, err error) []byte {
	must(answer, err)
	defer answer.Body.Close()
	read := must(io.ReadAll(answer.Body))
	if answer.StatusCode != http.StatusOK {
		must(0, fmt.Errorf("%s: %.200s", answer.Status, read))
	}
	return read
}

func compare(got, wanted []byte) {
	if !bytes.Equal(got, wanted) {
		must(0, fmt.Errorf("%d of %d bytes, and not the same", len(got), len(wanted)))
	}
}

func check(url string, arguments []string) {
	checked := 0
	start := time.Now()
	for pass := 0; pass < passes || time.Since(start) < lasting; pass++ {
		for _, argument := range arguments {
			echoed := strings.HasPrefix(argument, "echo=")
			size := must(strconv.Atoi(strings.TrimPrefix(argument, "echo=")))
			if size >= large && pass > 0 {
				continue
			}
			if echoed {
				sent := bytes.NewReader(pattern(size))
				compare(body(http.Post(url+"/echo", "application/octet-stream", sent)), pattern(size))
			} else {
				compare(body(http.Get(fmt.Sprintf("%s/bytes/%d", url, size))), pattern(size))
			}
			checked++
		}
	}
	fmt.Println("checked", checked)
}

func load(url string, seconds float64, size string) {
	var taken []float64
	start := time.Now()
	for now := start; time.Since(start).Seconds() < seconds; {
		body(http.Get(url + "/bytes/" + size))
		taken = append(taken, float64(time.Since(now))/1e3)
		now = time.Now()
	}
	for _, each := range taken {
		fmt.Printf("%.1f\n", each)
	}
}

// header reads until a header is whole; what follows it in the same segment comes along.
func header(from net.Conn) (read []byte, end int) {
	part := make([]byte, 4096)
	for {
		n, err := from.Read(part)
		read = append(read, part[:n]...)
		if end = bytes.Index(read, []byte("\r\n\r\n")); end >= 0 {
			return read, end + 4
		}
		if err != nil {
			return read, -1
		}
	}
}

// passSmall makes exchanges until a request is no small GET; that one is only passed on.
func passSmall(front, back net.Conn) {
	for {
		request, end := header(front)
		if _, err := back.Write(request); err != nil || end < 0 {
			return
		}
		var size int
		if n, _ := fmt.Sscanf(string(request), "GET /bytes/%d ", &size); n == 0 || size >= large {
			return
		}
		answer, end := header(back)
		if end < 0 {
			return
		}
		rest := make([]byte, end+size-len(answer))
		if _, err := io.ReadFull(back, rest); err != nil {
			return
		}
		if _, err := front.Write(append(answer, rest...)); err != nil {
			return
		}
	}
}

func copyAll(address, backend string, before func(front, back net.Conn)) {
	listener := must(net.Listen("tcp", address))
	for {
		front := must(listener.Accept())
		go func() {
			back, err := net.Dial("tcp", backend)
			if err != nil {
				front.Close()
				return
			}
			before(front, back)
			var both sync.WaitGroup
			for _, way := range [][2]net.Conn{{back, front}, {front, back}} {
				both.Add(1)
				go func() {
					defer both.Done()
					io.Copy(way[0], way[1])
					way[0].(*net.TCPConn).CloseWrite()
				}()
			}
			both.Wait()
			front.Close()
			back.Close()
		}()
	}
}

func main() {
	switch os.Args[1] {
	case "serve":
		serve(os.Args[2])
	case "copy":
		copyAll(os.Args[2], os.Args[3], func(front, back net.Conn) {})
	case "copy-header":
		copyAll(os.Args[2], os.Args[3], passSmall)
	case "client":
		url, arguments := os.Args[2], os.Args[4:]
		if os.Args[3] == "check" {
			check(url, arguments)
		} else {
			load(url, must(strconv.ParseFloat(arguments[0], 64)), arguments[1])
		}
	}
}
