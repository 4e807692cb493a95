// The contract's server and client with the JDK's own HTTP, and blocking sockets with available()
// and with BufferedReader.ready().
//
//   Java serve PORT | Java client URL check|load ... | Java frames PORT | Java ask HOST PORT COUNT SIZE
//   Java lines PORT | Java askLines HOST PORT COUNT SIZE

import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.BufferedReader;
import java.io.BufferedWriter;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.io.OutputStreamWriter;
import java.io.Writer;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;

public final class Java {
    private static final int PASSES = 3;
    private static final long LASTING_NS = 700_000_000L;
    private static final int LARGE = 1_000_000;
    private static final long PATIENCE_NS = 20_000_000_000L;
    private static final Map<Integer, byte[]> PATTERNS = new ConcurrentHashMap<>();

    private static byte[] pattern(int size) {
        return PATTERNS.computeIfAbsent(size, wanted -> {
            ByteBuffer words = ByteBuffer.allocate((wanted + 3) / 4 * 4);
            for (int word = 0; words.hasRemaining(); word++) {
                words.putInt(word);
            }
            return Arrays.copyOf(words.array(), wanted);
        });
    }

    private static void compare(byte[] got, byte[] wanted) throws IOException {
        if (!Arrays.equals(got, wanted)) {
            throw new IOException(got.length + " of " + wanted.length + " bytes, not the same");
        }
    }

    private static void answer(HttpExchange exchange, byte[] body) throws IOException {
        exchange.sendResponseHeaders(200, body.length == 0 ? -1 : body.length);
        try (OutputStream out = exchange.getResponseBody()) {
            out.write(body);
        }
    }

    private static void serve(int port) throws IOException {
        HttpServer server = HttpServer.create(new InetSocketAddress("0.0.0.0", port), 128);
        server.createContext("/bytes/", exchange -> {
            String path = exchange.getRequestURI().getPath();
            answer(exchange, pattern(Integer.parseInt(path.substring("/bytes/".length()))));
        });
        server.createContext("/echo", exchange -> answer(exchange, exchange.getRequestBody().readAllBytes()));
        server.setExecutor(Executors.newFixedThreadPool(8));
        server.start();
    }

    private static final HttpClient CLIENT =
            HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();

    private static byte[] get(String url, int size) throws IOException, InterruptedException {
        return send(HttpRequest.newBuilder(URI.create(url + "/bytes/" + size)).build());
    }

    private static byte[] echo(String url, byte[] body) throws IOException, InterruptedException {
        var publisher = HttpRequest.BodyPublishers.ofByteArray(body);
        return send(HttpRequest.newBuilder(URI.create(url + "/echo")).POST(publisher).build());
    }

    private static byte[] send(HttpRequest request) throws IOException, InterruptedException {
        HttpResponse<byte[]> answer = CLIENT.send(request, HttpResponse.BodyHandlers.ofByteArray());
        if (answer.statusCode() != 200) {
            throw new IOException(request + ": " + answer.statusCode());
        }
        return answer.body();
    }

    private static void check(String url, String[] arguments) throws Exception {
        int checked = 0;
        long start = System.nanoTime();
        for (int pass = 0; pass < PASSES || System.nanoTime() - start < LASTING_NS; pass++) {
            for (String argument : arguments) {
                boolean echoed = argument.startsWith("echo=");
                int size = Integer.parseInt(argument.replace("echo=", ""));
                if (size >= LARGE && pass > 0) {
                    continue;
                }
                compare(echoed ? echo(url, pattern(size)) : get(url, size), pattern(size));
                checked++;
            }
        }
        System.out.println("checked " + checked);
    }

    private static void load(String url, double seconds, int size) throws Exception {
        StringBuilder taken = new StringBuilder();
        long start = System.nanoTime();
        long now = start;
        while (now - start < seconds * 1e9) {
            get(url, size);
            long before = now;
            now = System.nanoTime();
            taken.append((now - before) / 1000.0).append('\n');
        }
        System.out.print(taken);
    }

    private interface Echo {
        void run(Socket socket) throws IOException, InterruptedException;
    }

    private static void accept(int port, Echo echo) throws IOException {
        try (ServerSocket listener = new ServerSocket(port)) {
            while (true) {
                Socket socket = listener.accept();
                new Thread(() -> {
                    try (socket) {
                        socket.setTcpNoDelay(true);
                        echo.run(socket);
                    } catch (IOException | InterruptedException ended) {
                        System.err.println(ended);
                    }
                }).start();
            }
        }
    }

    /** Echoes lines; reads of each only what ready() says is there, as old telnet and SMTP servers do. */
    private static void echoLines(Socket socket) throws IOException, InterruptedException {
        BufferedReader in = reader(socket);
        Writer out = writer(socket);
        int first;
        while ((first = in.read()) >= 0) {
            out.write(readReady(in, (char) first) + "\n");
            out.flush();
        }
    }

    private static BufferedReader reader(Socket socket) throws IOException {
        return new BufferedReader(new InputStreamReader(socket.getInputStream(), StandardCharsets.US_ASCII));
    }

    private static Writer writer(Socket socket) throws IOException {
        return new BufferedWriter(new OutputStreamWriter(socket.getOutputStream(), StandardCharsets.US_ASCII));
    }

    /** The rest of a line whose first character is known, without its end. */
    private static String readReady(BufferedReader in, char first) throws IOException, InterruptedException {
        StringBuilder line = new StringBuilder();
        long end = System.nanoTime() + PATIENCE_NS;
        for (int next = first; next != '\n'; next = in.read()) {
            line.append((char) next);
            while (!in.ready()) {
                if (System.nanoTime() > end) {
                    throw new IOException("ready() is false after " + line.length() + " characters");
                }
                Thread.sleep(0, 100_000);
            }
        }
        return line.toString();
    }

    private static String line(int number, int size) {
        StringBuilder made = new StringBuilder();
        while (made.length() < size) {
            made.append(number).append(':').append(made.length()).append(' ');
        }
        return made.substring(0, size);
    }

    private static void askLines(String host, int port, int count, int size) throws Exception {
        StringBuilder taken = new StringBuilder();
        try (Socket socket = new Socket(host, port)) {
            socket.setTcpNoDelay(true);
            BufferedReader in = reader(socket);
            Writer out = writer(socket);
            for (int round = 0; round < count; round++) {
                String wanted = line(round, size);
                long before = System.nanoTime();
                out.write(wanted + "\n");
                out.flush();
                String got = readReady(in, (char) in.read());
                if (!got.equals(wanted)) {
                    throw new IOException("line " + round + ": " + got.length() + " characters, not the same");
                }
                taken.append((System.nanoTime() - before) / 1000.0).append('\n');
            }
        }
        System.out.print(taken);
    }

    /** Reads as old JDBC drivers do: only when available() says so; echoes frames. */
    private static void echoFrames(Socket socket) throws IOException, InterruptedException {
        InputStream in = socket.getInputStream();
        DataOutputStream out = new DataOutputStream(socket.getOutputStream());
        int first;
        while ((first = in.read()) >= 0) {
            byte[] rest = new byte[3];
            new DataInputStream(in).readFully(rest);
            int size = ByteBuffer.wrap(new byte[] {(byte) first, rest[0], rest[1], rest[2]}).getInt();
            byte[] frame = readAvailable(in, size);
            out.writeInt(size);
            out.write(frame);
            out.flush();
        }
    }

    private static byte[] readAvailable(InputStream in, int size) throws IOException, InterruptedException {
        byte[] frame = new byte[size];
        int got = 0;
        long end = System.nanoTime() + PATIENCE_NS;
        while (got < size) {
            int available = in.available();
            if (available == 0) {
                if (System.nanoTime() > end) {
                    throw new IOException("available() is 0 after " + got + " of " + size + " bytes");
                }
                Thread.sleep(0, 100_000);
                continue;
            }
            got += in.read(frame, got, Math.min(available, size - got));
        }
        return frame;
    }

    private static void ask(String host, int port, int count, int size) throws Exception {
        StringBuilder taken = new StringBuilder();
        try (Socket socket = new Socket(host, port)) {
            socket.setTcpNoDelay(true);
            DataOutputStream out = new DataOutputStream(socket.getOutputStream());
            DataInputStream in = new DataInputStream(socket.getInputStream());
            byte[] message = ByteBuffer.allocate(size + 4).putInt(size).put(pattern(size)).array();
            for (int round = 0; round < count; round++) {
                long before = System.nanoTime();
                out.write(message);
                byte[] got = new byte[in.readInt()];
                in.readFully(got);
                compare(got, pattern(size));
                taken.append((System.nanoTime() - before) / 1000.0).append('\n');
            }
        }
        System.out.print(taken);
    }

    public static void main(String[] arguments) throws Exception {
        switch (arguments[0]) {
            case "serve" -> serve(Integer.parseInt(arguments[1]));
            case "frames" -> accept(Integer.parseInt(arguments[1]), Java::echoFrames);
            case "lines" -> accept(Integer.parseInt(arguments[1]), Java::echoLines);
            case "askLines" -> askLines(arguments[1], Integer.parseInt(arguments[2]),
                    Integer.parseInt(arguments[3]), Integer.parseInt(arguments[4]));
            case "ask" -> ask(arguments[1], Integer.parseInt(arguments[2]),
                    Integer.parseInt(arguments[3]), Integer.parseInt(arguments[4]));
            default -> {
                String[] rest = Arrays.copyOfRange(arguments, 3, arguments.length);
                if (arguments[2].equals("check")) {
                    check(arguments[1], rest);
                } else {
                    load(arguments[1], Double.parseDouble(rest[0]), Integer.parseInt(rest[1]));
                }
                System.exit(0); // HttpClient's selector thread is no daemon everywhere
            }
        }
    }
}
