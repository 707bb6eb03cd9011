// Protocol Buffers for whatever schema a FileDescriptorSet describes: no generated code, so that the page speaks exactly the API of
// the server that served it.
//
// Messages are plain objects under the fields' names in the .proto files. Fields without presence are always there, with their
// zero where the wire has none; others only where they are set. Enumerators are strings. Integers of 64 bits are numbers where a
// number holds them exactly, else BigInts. Not here: groups, proto2's required fields and extensions, none of which the API has.

/** Messages within messages; deeper ones are refused. */
const DEPTH_MAX = 64;

const VARINT = 0;
const FIXED64 = 1;
const DELIMITED = 2;
const FIXED32 = 5;

const utf8 = { encode: new TextEncoder(), decode: new TextDecoder("utf-8", { ignoreBOM: true }) };

/** By FieldDescriptorProto.Type: wire type, zero, how to read and to write one value. */
const SCALARS = {
    1: {
        wire: FIXED64,
        zero: 0,
        read: (r) => r.view(8).getFloat64(0, true),
        write: (w, v) => w.view(8).setFloat64(0, v, true),
    },
    2: {
        wire: FIXED32,
        zero: 0,
        read: (r) => r.view(4).getFloat32(0, true),
        write: (w, v) => w.view(4).setFloat32(0, v, true),
    },
    3: { wire: VARINT, zero: 0, read: (r) => narrow(BigInt.asIntN(64, r.varint())), write: (w, v) => w.varint(v) },
    4: { wire: VARINT, zero: 0, read: (r) => narrow(r.varint()), write: (w, v) => w.varint(v) },
    5: { wire: VARINT, zero: 0, read: (r) => Number(BigInt.asIntN(32, r.varint())), write: (w, v) => w.varint(v) },
    6: {
        wire: FIXED64,
        zero: 0,
        read: (r) => narrow(r.view(8).getBigUint64(0, true)),
        write: (w, v) => w.view(8).setBigUint64(0, BigInt(v), true),
    },
    7: { wire: FIXED32, zero: 0, read: (r) => r.view(4).getUint32(0, true), write: (w, v) => w.view(4).setUint32(0, v, true) },
    8: { wire: VARINT, zero: false, read: (r) => r.varint() !== 0n, write: (w, v) => w.varint(v ? 1 : 0) },
    9: {
        wire: DELIMITED,
        zero: "",
        read: (r) => utf8.decode.decode(r.delimited()),
        write: (w, v) => w.delimited(utf8.encode.encode(v)),
    },
    12: { wire: DELIMITED, zero: new Uint8Array(), read: (r) => r.delimited().slice(), write: (w, v) => w.delimited(v) },
    13: { wire: VARINT, zero: 0, read: (r) => Number(BigInt.asUintN(32, r.varint())), write: (w, v) => w.varint(v) },
    15: { wire: FIXED32, zero: 0, read: (r) => r.view(4).getInt32(0, true), write: (w, v) => w.view(4).setInt32(0, v, true) },
    16: {
        wire: FIXED64,
        zero: 0,
        read: (r) => narrow(r.view(8).getBigInt64(0, true)),
        write: (w, v) => w.view(8).setBigInt64(0, BigInt(v), true),
    },
    17: {
        wire: VARINT,
        zero: 0,
        read: (r) => Number(zigzag(r.varint())),
        write: (w, v) => w.varint((BigInt(v) << 1n) ^ (BigInt(v) >> 63n)),
    },
    18: {
        wire: VARINT,
        zero: 0,
        read: (r) => narrow(zigzag(r.varint())),
        write: (w, v) => w.varint((BigInt(v) << 1n) ^ (BigInt(v) >> 63n)),
    },
};

const TYPE_MESSAGE = 11;
const TYPE_ENUM = 14;

function narrow(value) {
    const number = Number(value);
    return Number.isSafeInteger(number) ? number : value;
}

function zigzag(value) {
    return (value >> 1n) ^ -(value & 1n);
}

/** What is left of a message's bytes. Reading past their end throws. */
class Reader {
    constructor(bytes) {
        this.bytes = bytes;
        this.at = 0;
    }

    get ended() {
        return this.at === this.bytes.length;
    }

    take(length) {
        if (length > this.bytes.length - this.at) throw new RangeError("a message ends too early");
        const start = this.at;
        this.at += length;
        return start;
    }

    varint() {
        const first = this.bytes[this.take(1)];
        if (first < 0x80) return BigInt(first);
        let value = BigInt(first & 0x7f);
        for (let shift = 7n; shift < 70n; shift += 7n) {
            const byte = this.bytes[this.take(1)];
            value |= BigInt(byte & 0x7f) << shift;
            if (byte < 0x80) return BigInt.asUintN(64, value);
        }
        throw new RangeError("a number is too long");
    }

    view(length) {
        const start = this.take(length);
        return new DataView(this.bytes.buffer, this.bytes.byteOffset + start, length);
    }

    delimited() {
        const length = Number(this.varint());
        const start = this.take(length);
        return this.bytes.subarray(start, start + length);
    }

    skip(wire) {
        if (wire === VARINT) this.varint();
        else if (wire === FIXED64) this.take(8);
        else if (wire === DELIMITED) this.delimited();
        else if (wire === FIXED32) this.take(4);
        else throw new RangeError(`wire type ${wire} is unknown`);
    }
}

/** Bytes that grow. */
class Writer {
    constructor() {
        this.bytes = new Uint8Array(64);
        this.length = 0;
    }

    take(length) {
        const start = this.length;
        this.length += length;
        if (this.length > this.bytes.length) {
            const grown = new Uint8Array(Math.max(this.length, 2 * this.bytes.length));
            grown.set(this.bytes);
            this.bytes = grown;
        }
        return start;
    }

    byte(byte) {
        // `take` may put other bytes in the place of these.
        const start = this.take(1);
        this.bytes[start] = byte;
    }

    varint(number) {
        let value = BigInt.asUintN(64, BigInt(number));
        while (value >= 0x80n) {
            this.byte(Number(value & 0x7fn) | 0x80);
            value >>= 7n;
        }
        this.byte(Number(value));
    }

    view(length) {
        const start = this.take(length);
        return new DataView(this.bytes.buffer, start, length);
    }

    delimited(bytes) {
        this.varint(bytes.length);
        const start = this.take(bytes.length);
        this.bytes.set(bytes, start);
    }

    finish() {
        return this.bytes.subarray(0, this.length);
    }
}

/** Types and methods of a FileDescriptorSet, by full name without a leading dot. */
export class Schema {
    constructor() {
        this.messages = new Map();
        this.enums = new Map();
        /** By path, as in "/package.Service/Method": `{ input, output, streaming }`. */
        this.methods = new Map();
    }

    /** Reads a serialised FileDescriptorSet. */
    static read(bytes) {
        const schema = new Schema();
        for (const file of DESCRIPTORS.decode("FileDescriptorSet", bytes).file) schema.addFile(file);
        return schema;
    }

    /** Takes a file in the form of a decoded FileDescriptorProto. */
    addFile(file) {
        const prefix = file.package ? `${file.package}.` : "";
        for (const message of file.message_type ?? []) this.addMessage(prefix, message);
        for (const one of file.enum_type ?? []) this.addEnum(prefix, one);
        for (const service of file.service ?? []) {
            for (const { name, input_type, output_type, server_streaming } of service.method) {
                const method = { input: bare(input_type), output: bare(output_type), streaming: server_streaming ?? false };
                this.methods.set(`/${prefix}${service.name}/${name}`, method);
            }
        }
    }

    addMessage(prefix, { name, field, nested_type, enum_type, options }) {
        const inner = `${prefix}${name}.`;
        for (const message of nested_type ?? []) this.addMessage(inner, message);
        for (const one of enum_type ?? []) this.addEnum(inner, one);
        const fields = (field ?? []).map((one) => this.field(one));
        this.messages.set(prefix + name, {
            fields,
            byName: new Map(fields.map((one) => [one.name, one])),
            byNumber: new Map(fields.map((one) => [one.number, one])),
            isMapEntry: options?.map_entry ?? false,
        });
    }

    addEnum(prefix, { name, value }) {
        const names = new Map(value.map((one) => [one.number, one.name]));
        this.enums.set(prefix + name, { names, numbers: new Map(value.map((one) => [one.name, one.number])) });
    }

    field({ name, number, label, type, type_name, oneof_index }) {
        const repeated = label === 3;
        const scalar = SCALARS[type];
        if (!scalar && type !== TYPE_MESSAGE && type !== TYPE_ENUM)
            throw new RangeError(`${name} has a type that is unknown here: ${type}`);
        return {
            name,
            number,
            type,
            repeated,
            typeName: bare(type_name ?? ""),
            scalar,
            wire: type === TYPE_MESSAGE ? DELIMITED : type === TYPE_ENUM ? VARINT : scalar.wire,
            // An `optional` field is alone in a oneof of its own.
            hasPresence: type === TYPE_MESSAGE || (oneof_index !== undefined && !repeated),
            oneof: oneof_index,
        };
    }

    message(name) {
        const found = this.messages.get(name);
        if (!found) throw new RangeError(`the schema has no message ${name}`);
        return found;
    }

    mapEntry(field) {
        if (!field.repeated || field.type !== TYPE_MESSAGE) return false;
        return this.message(field.typeName).isMapEntry;
    }

    decode(name, bytes, depth = 0) {
        if (depth > DEPTH_MAX) throw new RangeError("messages lie too deep in one another");
        const type = this.message(name);
        const message = {};
        for (const field of type.fields) {
            if (field.repeated) message[field.name] = this.mapEntry(field) ? new Map() : [];
            else if (!field.hasPresence) message[field.name] = this.zero(field);
        }
        const reader = new Reader(bytes);
        while (!reader.ended) {
            const tag = Number(reader.varint());
            const [number, wire] = [Math.floor(tag / 8), tag & 7];
            const field = type.byNumber.get(number);
            if (!field) reader.skip(wire);
            else if (field.repeated && wire === DELIMITED && field.wire !== DELIMITED) {
                const packed = new Reader(reader.delimited());
                while (!packed.ended) message[field.name].push(this.value(field, packed, depth));
            } else if (wire !== field.wire) throw new RangeError(`${name}.${field.name} has wire type ${wire}`);
            else this.put(type, message, field, this.value(field, reader, depth));
        }
        return message;
    }

    put(type, message, field, value) {
        if (this.mapEntry(field)) message[field.name].set(value.key, value.value);
        else if (field.repeated) message[field.name].push(value);
        else {
            // Of a oneof, the last one counts.
            if (field.oneof !== undefined) {
                for (const other of type.fields) if (other.oneof === field.oneof) delete message[other.name];
            }
            message[field.name] = value;
        }
    }

    value(field, reader, depth) {
        if (field.type === TYPE_MESSAGE) return this.decode(field.typeName, reader.delimited(), depth + 1);
        if (field.type === TYPE_ENUM) {
            const number = Number(BigInt.asIntN(32, reader.varint()));
            return this.enums.get(field.typeName)?.names.get(number) ?? number;
        }
        return field.scalar.read(reader);
    }

    zero(field) {
        if (field.type === TYPE_ENUM) return this.enums.get(field.typeName)?.names.get(0) ?? 0;
        return field.scalar.zero;
    }

    /** Fields that are undefined are left out; a name that the message does not have throws. */
    encode(name, message) {
        const type = this.message(name);
        const writer = new Writer();
        for (const [key, value] of Object.entries(message)) {
            const field = type.byName.get(key);
            if (!field) throw new RangeError(`${name} has no field ${key}`);
            if (value === undefined) continue;
            if (this.mapEntry(field)) for (const [key, one] of value) this.write(writer, field, { key, value: one });
            else if (field.repeated) for (const one of value) this.write(writer, field, one);
            else this.write(writer, field, value);
        }
        return writer.finish();
    }

    write(writer, field, value) {
        writer.varint(field.number * 8 + field.wire);
        if (field.type === TYPE_MESSAGE) writer.delimited(this.encode(field.typeName, value));
        else if (field.type === TYPE_ENUM) {
            const number = typeof value === "number" ? value : this.enums.get(field.typeName)?.numbers.get(value);
            if (number === undefined) throw new RangeError(`${field.typeName} has no ${value}`);
            writer.varint(number);
        } else field.scalar.write(writer, value);
    }
}

function bare(name) {
    return name.startsWith(".") ? name.slice(1) : name;
}

/** A file for `addFile` in short: messages as `{ Name: { field: [number, type or message's name, "repeated"?] } }`. */
export function file(package_, messages) {
    const prefix = package_ ? `.${package_}.` : ".";
    const types = { int32: 5, int64: 3, bool: 8, string: 9, bytes: 12 };
    const field = ([name, [number, type, label]]) => {
        const known = types[type];
        // A oneof each: what a descriptor leaves out differs from its zero.
        return {
            name,
            number,
            type: known ?? TYPE_MESSAGE,
            type_name: known ? undefined : prefix + type,
            label: label ? 3 : 1,
            oneof_index: label ? undefined : number,
        };
    };
    const message_type = Object.entries(messages).map(([name, fields]) => ({ name, field: Object.entries(fields).map(field) }));
    return { package: package_, message_type };
}

/** As much of descriptor.proto as is read here. */
const DESCRIPTORS = new Schema();
DESCRIPTORS.addFile(
    file("", {
        FileDescriptorSet: { file: [1, "FileDescriptorProto", "repeated"] },
        FileDescriptorProto: {
            package: [2, "string"],
            message_type: [4, "DescriptorProto", "repeated"],
            enum_type: [5, "EnumDescriptorProto", "repeated"],
            service: [6, "ServiceDescriptorProto", "repeated"],
        },
        DescriptorProto: {
            name: [1, "string"],
            field: [2, "FieldDescriptorProto", "repeated"],
            nested_type: [3, "DescriptorProto", "repeated"],
            enum_type: [4, "EnumDescriptorProto", "repeated"],
            options: [7, "MessageOptions"],
        },
        MessageOptions: { map_entry: [7, "bool"] },
        FieldDescriptorProto: {
            name: [1, "string"],
            number: [3, "int32"],
            label: [4, "int32"],
            type: [5, "int32"],
            type_name: [6, "string"],
            oneof_index: [9, "int32"],
        },
        EnumDescriptorProto: { name: [1, "string"], value: [2, "EnumValueDescriptorProto", "repeated"] },
        EnumValueDescriptorProto: { name: [1, "string"], number: [2, "int32"] },
        ServiceDescriptorProto: { name: [1, "string"], method: [2, "MethodDescriptorProto", "repeated"] },
        MethodDescriptorProto: {
            name: [1, "string"],
            input_type: [2, "string"],
            output_type: [3, "string"],
            server_streaming: [6, "bool"],
        },
    }),
);
